"""Recorded validation losses: from a run folder's metrics, or from a CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from mftcoder_coba.config.section import SafeName
from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.records import Run, Series, read_run

SLOT = ".slot"
LARGEST_SLOT = 1_000_000  # memory of paired slopes grows with the largest
CSV_HELP = "the first line names the columns: step,TASK,TASK,... (and TASK.slot where known); the line of step 0 holds the losses before training"


@dataclass(frozen=True)
class Recording:
    """What was observed of K tasks at n steps.

    Attributes:
        initial: [K] v(0). losses: [n, K], NaN where missing. steps: [n], increasing, from 1.
        slots: [n, K] int64, or None where they are not known throughout.
        coverage: M, the mini-batches that cover the validation set; None where nothing tells.
        own: the run's `balancer` section; None for a CSV. weights: [n, K] as the run recorded them, NaN where it did not.
    """

    source: Path
    tasks: tuple[str, ...]
    initial: NDArray[np.float64]
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    slots: NDArray[np.int64] | None
    coverage: int | None
    own: dict[str, Any] | None = None
    weights: NDArray[np.float64] | None = None


def read_recording(source: Path) -> Recording:
    """Raises UserError: `source` is neither a run folder with recorded losses nor such a CSV."""
    return _of_csv(source) if source.is_file() else _of_run(read_run(source))


def _of_run(run: Run) -> Recording:
    series, full = run.metrics.balancer, run.metrics.validation
    tasks = tuple(run.tasks)
    losses = _columns(series, tasks, "valid_loss")
    start = full.index_of(0)
    if not np.isfinite(losses).any() or start is None:
        kind = run.setting("balancer.kind")
        missing = "validation losses after its steps" if start is not None else "validation losses before training"
        raise UserError(
            f"the run has recorded no {missing}" + (f"; its balancer is {kind}" if kind else ""),
            str(run.folder),
            "replay a run whose balancer looks at validation losses, such as coba; or give losses that you have as a CSV: " + CSV_HELP,
        )
    if (np.diff(series.steps) <= 0).any():
        raise UserError("the steps of the balancer's records do not increase", str(run.folder / "metrics.jsonl"), "restore the file")
    coverage = (run.environment.get("plan") or {}).get("validation_mini_batches")
    return _recording(
        source=run.folder,
        tasks=tasks,
        initial=_columns(full, tasks, "loss")[start],
        steps=series.steps,
        losses=losses,
        slots=_columns(series, tasks, "slot"),
        coverage=coverage,
        own=run.config.get("balancer"),
        weights=_columns(series, tasks, "weight"),
    )


def _columns(series: Series, tasks: tuple[str, ...], name: str) -> NDArray[np.float64]:
    return np.stack([series.of_task(task, name) for task in tasks], axis=1) if tasks else np.empty((len(series), 0))


def _recording(slots: NDArray[np.float64], coverage: int | None, **parts: Any) -> Recording:
    """Slots become whole numbers where they are all there; they also tell the coverage, if nothing else does."""
    whole = slots.astype(np.int64) if slots.size and np.isfinite(slots).all() else None
    if coverage is None and whole is not None:
        coverage = int(whole.max()) + 1
    return Recording(slots=whole, coverage=coverage, **parts)


def _of_csv(path: Path) -> Recording:
    header, rows = _read_table(path)
    tasks = _tasks_of(header, f"{path}:1")
    slot_columns = [header.index(task + SLOT) if task + SLOT in header else None for task in tasks]
    loss_columns = [header.index(task) for task in tasks]
    steps: list[int] = []
    losses: list[list[float]] = []
    slots: list[list[float]] = []
    for number, row in rows:
        where = f"{path}:{number}"
        if len(row) != len(header):
            raise UserError(f"has {len(row)} values; the first line names {len(header)} columns", where)
        steps.append(_step(row[0], steps, where))
        losses.append([_loss(row[column], header[column], where) for column in loss_columns])
        slots.append([math.nan if column is None else _slot(row[column], header[column], where) for column in slot_columns])
    if len(steps) < 2:
        raise UserError("holds no observation after the line of step 0", str(path), CSV_HELP)
    return _recording(
        source=path,
        tasks=tasks,
        initial=np.array(losses[0]),
        steps=np.array(steps[1:], np.int64),
        losses=np.array(losses[1:]),
        slots=np.array(slots[1:]),
        coverage=None,
    )


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """(column names, [(line number, values)]) without empty lines."""
    rows: list[tuple[int, list[str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(value.strip() for value in row):
                    rows.append((reader.line_num, [value.strip() for value in row]))
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", str(path)) from None
    except (csv.Error, OSError) as error:
        raise UserError(f"cannot be read as CSV: {error}", str(path)) from None
    if not rows:
        raise UserError("is empty", str(path), CSV_HELP)
    return rows[0][1], rows[1:]


def _tasks_of(header: list[str], where: str) -> tuple[str, ...]:
    if header[0] != "step":
        raise UserError(f'the first column is "{header[0]}", not "step"', where, CSV_HELP)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"two columns have the name {', '.join(twice)}", where)
    tasks = tuple(name for name in header[1:] if not name.endswith(SLOT))
    strange = [name for name in header[1:] if name.endswith(SLOT) and name.removesuffix(SLOT) not in tasks]
    if strange or not tasks:
        raise UserError(f"the column {strange[0]} is of no task" if strange else "names no task", where, CSV_HELP)
    for name in tasks:
        try:
            TypeAdapter(SafeName).validate_python(name)
        except ValidationError:
            raise UserError(f'"{name}" cannot be the name of a task', where, "use letters, digits and . _ - as in an experiment") from None
    return tasks


def _step(text: str, before: list[int], where: str) -> int:
    step = int(text) if text.isascii() and text.isdigit() else None
    if step is None or step >= 2**53:
        raise UserError(f'the step is "{text}", not a whole number', where)
    if not before and step != 0:
        raise UserError(f"the first line of losses is of step {step}, not of step 0", where, CSV_HELP)
    if before and step <= before[-1]:
        raise UserError(f"step {step} comes after step {before[-1]}; steps must increase", where)
    return step


def _loss(text: str, column: str, where: str) -> float:
    """What is not finite counts as missing, as in a run."""
    if text.lower() in ("", "null"):
        return math.nan
    try:
        loss = float(text)
    except ValueError:
        raise UserError(f'{column} is "{text}", not a number', where, "leave the value empty where the loss is missing") from None
    return loss if math.isfinite(loss) else math.nan


def _slot(text: str, column: str, where: str) -> float:
    if text.isascii() and text.isdigit() and int(text) <= LARGEST_SLOT:
        return float(text)
    if text.lower() in ("", "null"):
        return math.nan
    raise UserError(f'{column} is "{text}", not a whole number from 0 to {LARGEST_SLOT:,}', where)
