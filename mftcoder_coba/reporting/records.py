"""A run folder, read: the records of `metrics.jsonl` as columns, and the small JSON files beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.gates import Gates, gates_of, is_gates_record

METRICS_FILE = "metrics.jsonl"
LARGEST_STEP = 2**53
RESTORE = "restore the file, or remove it to do without"
# What readers of a run rely on, where the files hold it.
SHAPES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "config": {
        "run": dict,
        "run.name": str,
        "model": dict,
        "model.path": str,
        "adapter": dict,
        "adapter.kind": str,
        "data": dict,
        "data.tasks": list,
        "balancer": dict,
        "balancer.kind": str,
    },
    "environment": {"plan": dict, "parameters": dict, "parameters.trainable": (int, float)},
    "accounting": {"tasks": dict},
    "best": {"step": int, "criterion": str, "value": (int, float)},
}


@dataclass(frozen=True)
class Series:
    """The records of one kind as columns, in the order of the file. NaN stands for null and for what a record does not hold."""

    steps: NDArray[np.int64]  # [records]
    values: dict[str, NDArray[np.float64]]  # name -> [records]
    tasks: dict[str, dict[str, NDArray[np.float64]]]  # task -> name -> [records]

    def __len__(self) -> int:
        return len(self.steps)

    def value(self, name: str) -> NDArray[np.float64]:
        return self.values.get(name, np.full(len(self), np.nan))

    def of_task(self, task: str, name: str) -> NDArray[np.float64]:
        return self.tasks.get(task, {}).get(name, np.full(len(self), np.nan))

    def index_of(self, step: int) -> int | None:
        """Where the last record of `step` is, or None."""
        found = np.flatnonzero(self.steps == step)
        return int(found[-1]) if len(found) else None


@dataclass(frozen=True)
class Metrics:
    """All records of a run. `tasks` are in the order in which they first appear."""

    tasks: list[str]
    train: Series
    balancer: Series
    validation: Series
    events: list[dict[str, Any]]
    gates: list[Gates]  # of the full validations; empty where the adapter has none

    @property
    def last_step(self) -> int:
        return int(max((series.steps.max() for series in (self.train, self.balancer, self.validation) if len(series)), default=0))


@dataclass(frozen=True)
class Run:
    """A run folder. A file that the run has not written yet is an empty dict."""

    folder: Path
    metrics: Metrics
    config: dict[str, Any]
    environment: dict[str, Any]
    accounting: dict[str, Any]
    best: dict[str, Any]

    @property
    def name(self) -> str:
        return self.setting("run.name") or self.folder.resolve().name

    @property
    def tasks(self) -> list[str]:
        """The config's order, then tasks that only the records know."""
        named = [task["name"] for task in self.setting("data.tasks") or []]
        return list(dict.fromkeys(named + self.metrics.tasks))

    def setting(self, path: str) -> Any:
        """The config's value at `a.b`, or None."""
        return _at(self.config, path)


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: `folder` is no run folder, or one of its files is broken.
    """
    metrics = read_metrics(folder)
    run = Run(folder, metrics, *(_read_object(folder / f"{name}.json", shape) for name, shape in SHAPES.items()))
    if not all(isinstance(task, dict) and isinstance(task.get("name"), str) for task in run.setting("data.tasks") or []):
        raise UserError("data.tasks is not what a run writes: objects with a name", str(folder / "config.json"), RESTORE)
    if run.best and any(run.best.get(name) is None for name in SHAPES["best"]):
        raise UserError("is not what a run writes: step, criterion and value", str(folder / "best.json"), RESTORE)
    return run


def read_metrics(folder: Path) -> Metrics:
    """Reads `metrics.jsonl`. A torn last line, as a killed run leaves it, is not read.

    Raises:
        UserError: `folder` is no run folder, or a line other than the last is not a record.
    """
    if not folder.is_dir():
        raise UserError("no such run folder", str(folder))
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"is no run folder: it holds no {METRICS_FILE}", str(folder), "give the folder that `train` wrote, such as runs/NAME")
    by_kind: dict[str, list[dict[str, Any]]] = {"train": [], "balancer": [], "validation": [], "event": [], "gates": []}
    for _, record in read_lines(path):
        by_kind.setdefault(record["kind"], []).append(record)
    columns = {kind: _columns(by_kind[kind]) for kind in ("train", "balancer", "validation")}
    tasks = list(dict.fromkeys(task for kind in ("validation", "train", "balancer") for task in columns[kind].tasks))
    return Metrics(tasks, **columns, events=by_kind["event"], gates=[gates_of(record) for record in by_kind["gates"]])


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a metrics file, without their line end, each with its record.

    Raises:
        UserError: a line other than the last is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is not None:
            records.append((line, record))
        elif number < len(lines):
            what = "is not a record: a JSON object with `kind` and `step`, and what belongs to its kind"
            raise UserError(what, f"{path}:{number}", "remove this line, or restore the file")
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also: not UTF-8
        return None
    if not (isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int):
        return None
    tasks = record.get("tasks", {})
    whole = 0 <= record["step"] < LARGEST_STEP and isinstance(tasks, dict) and all(isinstance(values, dict) for values in tasks.values())
    return record if whole and (record["kind"] != "gates" or is_gates_record(record)) else None


def _columns(records: list[dict[str, Any]]) -> Series:
    steps = np.array([record["step"] for record in records], dtype=np.int64)
    values: dict[str, NDArray[np.float64]] = {}
    tasks: dict[str, dict[str, NDArray[np.float64]]] = {}

    def put(columns: dict[str, NDArray[np.float64]], row: int, items: dict[str, Any]) -> None:
        for name, value in items.items():
            if isinstance(value, int | float):
                if name not in columns:
                    columns[name] = np.full(len(records), np.nan)
                columns[name][row] = value

    for row, record in enumerate(records):
        put(values, row, record)
        for task, items in record.get("tasks", {}).items():
            put(tasks.setdefault(task, {}), row, items)
    values.pop("step", None)
    return Series(steps, values, tasks)


def _read_object(path: Path, shape: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no file. What `shape` names has its type, is null, or is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", str(path), RESTORE) from None
    if not isinstance(content, dict):
        raise UserError("must be a JSON object { ... }", str(path), RESTORE)
    for name, kind in shape.items():
        value = _at(content, name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{name} is {json.dumps(value)[:60]}, which is not what a run writes", str(path), RESTORE)
    return content


def _at(tree: dict[str, Any], path: str) -> Any:
    """The value at `a.b`, or None."""
    node: Any = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
