"""What the user names -> the config, the tasks, the split. Importing it never imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mftcoder_coba.config import Config, load_config
from mftcoder_coba.errors import UserError

SPLITS = ("valid", "test", "train")


def check_alone() -> None:
    """Raises UserError where a launcher has started several processes: each would do all of it."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        raise UserError(f"evaluate is one process; {world_size} were started", "the launcher", "start it as python -m mftcoder_coba evaluate")


def experiment_of(source: Path, config: Path | None, overrides: Sequence[str], base_model: str | None) -> Config:
    """The experiment in `config`, or that of the run which `source` is or is the export of.

    Args:
        base_model: in place of `model.path`.

    Raises:
        UserError: it is not named, or wrong.
    """
    if config is None:
        run = next((folder for folder in (source, source.absolute().parent) if (folder / "metrics.jsonl").is_file()), None)
        if not source.is_dir() or run is None:
            what = "is no run folder, so nothing says which data is meant" if source.is_dir() else "no such folder"
            raise UserError(what, str(source), "give a run folder, or name an experiment with --config")
        config = run / "config.json"
    base = [f"model.path={json.dumps(base_model)}"] if base_model is not None else []
    return load_config(config, [*overrides, *base])


def chosen_tasks(config: Config, names: Sequence[str]) -> list[str]:
    """Names of tasks, in the order of the config. Raises UserError for one that it does not have."""
    known = config.data.task_names
    for name in names:
        if name not in known:
            raise UserError(f"the experiment has no task {name}; it has {', '.join(known)}", f"--task {name}")
    return [name for name in known if not names or name in names]


def chosen_split(config: Config, tasks: Sequence[str], wanted: str | None) -> str:
    """`wanted`, or the default: test where each of the tasks has test files, else valid.

    Raises:
        UserError: a task has no data for it.
    """
    sections = [task for task in config.data.tasks if task.name in tasks]
    split = wanted or ("test" if all(task.test for task in sections) else "valid")
    held_out = split == "valid" and config.data.valid_fraction > 0
    without = [task.name for task in sections if not (held_out or getattr(task, split))]
    if without:
        raise UserError(f"no {split} data of {', '.join(without)}", f"data.tasks[].{split}", way_out(split, tasks, without))
    return split


def way_out(split: str, tasks: Sequence[str], without: Sequence[str]) -> str:
    """What to do where some of the tasks have no data."""
    others = " ".join(f"--task {task}" for task in tasks if task not in without)
    ways = [f"name `{split}` files", f"evaluate {others}" if others else "", "choose another --split"]
    return ", or ".join(filter(None, ways))
