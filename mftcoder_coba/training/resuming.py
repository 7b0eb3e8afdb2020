"""What a checkpoint says of its run, and whether this run may go on from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftcoder_coba.config import Config
from mftcoder_coba.data import Corpus
from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.records import METRICS_FILE
from mftcoder_coba.training.checkpoints import Checkpoints
from mftcoder_coba.training.config_changes import Changes, changes
from mftcoder_coba.training.versions import versions


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Attributes:
        state: its state.json.
        damaged: what was wrong with newer ones, a line each.
        changes: what the config says otherwise than when it was saved.
        set_aside: checkpoints of later steps, which this run no longer has.
    """

    checkpoint: Path
    state: dict[str, Any]
    damaged: list[str]
    changes: Changes
    set_aside: list[str]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def stream_rows(self) -> int | None:
        """Rows of the balancer's mini-batch: as the run began, whatever the number of ranks; None: as the config says now."""
        insisted = any(line.startswith("validation.balancer_rows_per_rank") for line in self.changes.refused)
        return None if insisted else self.state["stream_rows"]

    def story(self, world_size: int, zero_stage: int) -> str:
        """One line that tells how this run differs from the one that saved."""
        parts = [f"from {self.checkpoint.name}"]
        was = self.state["processes"]
        if (was["world_size"], was["zero_stage"]) != (world_size, zero_stage):
            parts.append(f"saved on {was['world_size']} ranks with ZeRO-{was['zero_stage']}, now {world_size} with ZeRO-{zero_stage}")
        now = versions()
        parts += [f"{name} {old} -> {now.get(name)}" for name, old in self.state["versions"].items() if now.get(name) != old]
        parts += self.changes.free
        parts += [f"insisted on: {line}" for line in self.changes.refused]
        return "; ".join(parts)


def identity(config: Config, corpus: Corpus, processes: Processes) -> dict[str, Any]:
    """The part of a checkpoint's state that does not change during a run."""
    return {
        "config": config.model_dump(),
        "data": corpus.fingerprints,
        "processes": {"world_size": processes.world_size, "zero_stage": config.zero_stage},
        "versions": versions(),
    }


def resume_from(checkpoints: Checkpoints, config: Config, corpus: Corpus, processes: Processes, allow_config_change: bool) -> Resumed | None:
    """The checkpoint that the run goes on from; None: it starts. To be called on all ranks, in the claimed run folder.

    Raises:
        UserError: all are damaged, or the config or the data would make another run of it.
    """
    # Looked for here and not earlier: while this run waited for the folder, the one before it may have saved.
    checkpoint, damaged = checkpoints.newest_sound(checkpoints.candidates(config.checkpoint.resume), processes)
    if checkpoint is None:
        return None
    state = checkpoints.read_state(checkpoint)
    found = changes(state["config"], config, state["data"], corpus.fingerprints)
    if found.refused and not allow_config_change:
        raise found.error(checkpoint)
    saved_tasks = list(state["data"])
    if saved_tasks != list(corpus.tasks):
        raise UserError(
            f"the checkpoint's tasks are {', '.join(saved_tasks)}, the config's {', '.join(corpus.tasks)}: a task's losses are measured from before "
            "the first step on, so no task can come or go within a run, not even with --allow-config-change",
            str(checkpoint),
            "start a new run (another run.name), from this run's exported model if you like (model.path)",
        )
    set_aside = processes.gather_objects(_clear_the_way(checkpoints, checkpoint, state["step"]) if processes.is_main else None)[0]
    if isinstance(set_aside, OSError):
        raise UserError(f"the run folder cannot be written: {set_aside.strerror}", str(set_aside.filename or checkpoints.folder)) from None
    return Resumed(checkpoint, state, damaged, found, set_aside)


def _clear_the_way(checkpoints: Checkpoints, checkpoint: Path, step: int) -> list[str] | OSError:
    """What comes after `step` is no longer this run's. The names of checkpoints set aside, or why that was not possible."""
    try:
        if checkpoint.parent == checkpoints.folder:
            return checkpoints.set_aside_after(step)
        _take_over_metrics(checkpoint, checkpoints.folder.parent)
        return []
    except OSError as error:
        return error


def _take_over_metrics(checkpoint: Path, run_folder: Path) -> None:
    """A run that begins at another run's checkpoint has that run's records up to there as its history."""
    theirs = checkpoint.parent.parent / METRICS_FILE
    if theirs.is_file():
        shutil.copyfile(theirs, run_folder / METRICS_FILE)
