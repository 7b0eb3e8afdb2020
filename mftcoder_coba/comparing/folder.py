"""The folder of a comparison: what it was made from, and that it is made from nothing else.

OUT/compare.json        experiment, data, launcher and methods, as the first call gave them; later calls may add methods and seeds
OUT/configs/RUN.json    the config of each run
OUT/logs/RUN.log        what the run printed
OUT/RUN/                an ordinary run folder
OUT/compare.*           tables, page; OUT/figures/ PNG files
OUT/orders.*            and OUT/results/, of the command `orders`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mftcoder_coba.comparing.methods import Methods, folder_name
from mftcoder_coba.comparing.runs import PlannedRun
from mftcoder_coba.config import Config, validate
from mftcoder_coba.data import Corpus
from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.pages import write_text

PLAN_FILE = "compare.json"
DIFFERENCES_TOLD = 5
REPLACED = {"run": {"name", "dir", "seed"}, "balancer": True, "checkpoint": True, "tracking": True}


def lock(out: Path) -> FileLock:
    """Keeps other processes out of the folder while the lock is held.

    Raises:
        UserError: it cannot be made or written, or another process works in it.
    """
    held = FileLock(out / ".compare.lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.acquire(blocking=False)
    except Timeout:
        raise UserError("another compare or orders is working in this folder", str(out), "wait for its end, or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", str(out), "choose another --out") from None
    return held


def claim(out: Path, base: Config, methods: Methods, launcher: str, corpus: Corpus, runs: Sequence[PlannedRun]) -> None:
    """Writes compare.json and the configs of the runs, after making sure that runs made before are of the same comparison.

    Raises:
        UserError: the folder holds a comparison of another experiment, or run folders of nobody knows what.
    """
    plan = written_plan(base, methods, launcher, corpus)
    file = out / PLAN_FILE
    if file.is_file():
        old = _read(file)
        # A method that never began may change: its settings were refused, say.
        old["experiment"] = _with_new_keys(old["experiment"], base)
        old["methods"] = {name: section for name, section in old["methods"].items() if _began(out, name, corpus.tasks)}
        _refuse_changes(old, plan, file)
        plan["methods"] = old["methods"] | plan["methods"]
    else:
        strangers = [run.name for run in runs if run.folder.exists()]
        if strangers:
            what = f"holds the run folder {strangers[0]}, and no {PLAN_FILE} that says what it was made from"
            raise UserError(what, str(out), "choose another --out")
    _write(file, plan)
    (out / "configs").mkdir(exist_ok=True)
    for run in runs:
        _write(out / "configs" / f"{run.name}.json", run.config.model_dump())


def written_plan(base: Config, methods: Methods, launcher: str, corpus: Corpus) -> dict[str, Any]:
    """All that results depend on. Name, folder and seed of the base config are replaced in each run; how often a checkpoint is written
    and what is logged changes nothing."""
    experiment = base.model_dump(exclude=REPLACED)
    data = {task: {split: _counts(part) for split, part in splits.items() if split != "test"} for task, splits in corpus.accounting.items()}
    return {"experiment": experiment, "data": data, "launcher": launcher, "methods": {name: method.written() for name, method in methods.items()}}


def _with_new_keys(experiment: dict[str, Any], base: Config) -> dict[str, Any]:
    """The experiment of a plan that an older version wrote: keys that it did not know have their defaults."""
    now = base.model_dump()
    try:
        return validate(now | experiment | {"run": now["run"] | experiment.get("run", {})}, PLAN_FILE).model_dump(exclude=REPLACED)
    except UserError:  # a key that is no more: the differences tell it
        return experiment


def _began(out: Path, method: str, tasks: Sequence[str]) -> bool:
    """Whether there is a run folder of the method, with any seed."""
    stem = folder_name(method)
    return any(next(out.glob(f"{start}-seed*"), None) for start in (stem, *(f"{stem}-{task}" for task in tasks)))


def _counts(part: Any) -> dict[str, int]:
    return {"samples": part.used.samples, "tokens": part.used.tokens, "supervised_tokens": part.supervised_tokens}


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], file: Path) -> None:
    new = json.loads(json.dumps(new))  # as it would be read again
    common = [name for name in new["methods"] if name in old["methods"]]  # others are added, or left alone
    before, after = ({**plan, "methods": {name: plan["methods"][name] for name in common}} for plan in (old, new))
    found = differences(before, after)
    if found:
        more = f"\n  and {len(found) - DIFFERENCES_TOLD} more" if len(found) > DIFFERENCES_TOLD else ""
        told = "\n  ".join(found[:DIFFERENCES_TOLD])
        what = f"the folder holds a comparison of something else; results of both would not be comparable:\n  {told}{more}"
        raise UserError(what, str(file), "give another --out, or the same experiment; methods and seeds may be added")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two plain trees differ, a line each: "training.learning_rate: was 0.005, is 0.001"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for index, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}[{index}]")]
    return [] if old == new else [f"{path}: was {json.dumps(old)}, is {json.dumps(new)}"]


def _read(file: Path) -> dict[str, Any]:
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(plan["methods"], dict) and isinstance(plan["experiment"], dict):
            return plan
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError("is no plan of a comparison", str(file), "choose another --out, or restore the file")


def _write(file: Path, tree: dict[str, Any]) -> None:
    write_text(file, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
