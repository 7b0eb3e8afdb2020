"""Checkpoints of a run, as all ranks write them and find them again: written aside, verified, published by one rename.

    checkpoints/step-000100/states/...      the engine's part, by rank
    checkpoints/step-000100/state.json      everything else that advances, as plain values
    checkpoints/step-000100/manifest.json   size and checksum of the others

What else is in the folder is told in `checkpoint_folder`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mftcoder_coba.engine import Engine, Processes
from mftcoder_coba.engine.tensor_files import FileDigest
from mftcoder_coba.errors import UserError
from mftcoder_coba.training.checkpoint_folder import LATEST, SET_ASIDE, CheckpointFolder, checkpoints_in, step_of, sync_folder, told, write_file
from mftcoder_coba.training.manifest import MANIFEST_FILE, Manifest, digest_of, folders_of, problem, read_manifest, size_problem, strangers

STATE_FILE = "state.json"
SHARED = "is the run folder on a file system that all machines share?"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints` of the run folder.
        keep: newest ones to keep; the best one is kept beside them.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._files = CheckpointFolder(folder)

    def save(self, engine: Engine, step: int, state: dict[str, Any], best_step: int | None) -> str | None:
        """Writes the checkpoint of `step`. To be called on every rank with the same arguments.

        Args:
            state: plain values, as JSON has them.
            best_step: the best validated step so far; its checkpoint is not pruned.

        Returns:
            None, or why nothing was saved (a full disk, and whatever else the file system refuses), the same on every rank. Then the checkpoints
            that were there are there still. Trouble with `latest` or with pruning is a warning on stderr.
        """
        processes, aside = engine.processes, self._files.aside(step)
        trouble = _on_main(processes, lambda: self._files.begin(step))
        if trouble:
            return trouble
        outcomes = processes.gather_objects(_result_or_trouble(lambda: engine.save(aside)))
        trouble = "; ".join(f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str))
        if not trouble:
            files = {name: digest for outcome in outcomes for name, digest in outcome.items()}
            trouble = _on_main(processes, lambda: self._complete(step, state, files))
        if processes.is_main:
            if trouble:
                self._files.discard(step)
            else:
                self._files.tidy(step, best_step, self.keep)
        return trouble or None

    def _complete(self, step: int, state: dict[str, Any], files: dict[str, FileDigest]) -> None:
        """The last files, a look at all of them, and the name that makes it a checkpoint."""
        aside, content = self._files.aside(step), json.dumps(state).encode()
        files = files | {STATE_FILE: digest_of(content)}
        write_file(aside / STATE_FILE, content)
        write_file(aside / MANIFEST_FILE, Manifest(step, files).to_bytes())
        wrong = [line for line in (size_problem(aside, name, digest) for name, digest in files.items()) if line]
        if wrong:
            raise OSError(f"{'; '.join(wrong)}: {SHARED}")
        for folder in folders_of(files):
            sync_folder(aside / folder)
        self._files.publish(step)

    def candidates(self, resume: str) -> list[Path]:
        """What `checkpoint.resume` means, damaged ones included, the best first. Changes nothing, needs no other rank.

        Args:
            resume: "never": none. "auto": those of this run, newest first. The path of one of this run: that one, to go back to it. A path
                elsewhere (a checkpoint, or a run folder, for its newest): where a run begins. What was saved since the run was first told to
                begin there, or to go back, comes first, so that the same job goes on when it is started again.

        Raises:
            UserError: a path that leads to no checkpoint.
        """
        if resume == "never":
            return []
        own = [self._files.of(step) for step in reversed(self._files.steps())]
        if resume == "auto":
            return own
        path = Path(resume)
        if path.name == LATEST and path.is_symlink():
            path = path.parent / os.readlink(path)
        folder = self.folder.resolve()
        if path.parent.resolve() == folder:
            found = [one for one in own if one.name == path.name]
            own = [one for one in own if found and step_of(one.name) > step_of(path.name) and _went_back(one, resume)] + found
        elif path.resolve() in (folder, folder.parent):
            found = own
        else:
            found = _elsewhere(path)
            own = own + found
        if not found:
            raise _no_checkpoint(resume)
        return own

    def newest_sound(self, candidates: list[Path], processes: Processes) -> tuple[Path | None, list[str]]:
        """The first candidate of rank 0 that is what was written, to the byte. To be called on every rank, in the claimed run folder.

        The ranks share the reading. Also puts back what a save left that was killed while it replaced a checkpoint.

        Returns:
            the checkpoint, None if there are no candidates; what is wrong with those before it, a line each.

        Raises:
            UserError: all are damaged, or a rank does not see what another one sees.
        """
        trouble = _on_main(processes, self._files.recover)
        if trouble:
            raise UserError(f"the checkpoint that an interrupted save left cannot be put back: {trouble}", str(self.folder))
        lists = processes.gather_objects([str(path) for path in candidates])
        if not lists[0]:
            for rank, others in enumerate(lists):
                if others:
                    raise UserError(f"rank 0 does not see {others[0]}, which rank {rank} sees: {SHARED}", "run.dir")
            return None, []
        damaged: list[str] = []
        for path in map(Path, lists[0]):
            wrong = self._damage(path, processes)
            if not wrong:
                return path, damaged
            label = f"{self.folder.name}/{path.name}" if path.parent == self.folder else path
            damaged += [f"{label}: {line}" for line in wrong]
        raise UserError(
            "no checkpoint is whole:\n" + "\n".join(f"  {line}" for line in damaged),
            str(self.folder),
            'restore a file that is named here, or start anew with another run.name and checkpoint.resume = "never"',
        )

    def _damage(self, path: Path, processes: Processes) -> list[str]:
        """What is wrong with one checkpoint, the same on every rank."""
        opened = processes.gather_objects(_open(path) if processes.is_main else None)[0]
        if isinstance(opened, str):
            return [opened]
        seen = processes.gather_objects(os.path.isdir(path))
        if not all(seen):
            raise UserError(f"rank {seen.index(False)} does not see {path}: {SHARED}", "run.dir")
        share = list(opened.files.items())[processes.rank :: processes.world_size]
        wrong = [problem(path, name, digest) for name, digest in share]
        return [line for lines in processes.gather_objects(wrong) for line in lines if line]

    def set_aside_after(self, step: int) -> list[str]:
        """Renames this run's checkpoints of later steps, so that they are never taken for this run's again. For rank 0 alone.

        They are damaged, or of a course that the run left when it went back.

        Returns:
            their new names, newest first.

        Raises:
            OSError: one could not be renamed.
        """
        return self._files.set_aside_after(step)

    @staticmethod
    def read_state(checkpoint: Path) -> dict[str, Any]:
        """What `save` was given as `state`."""
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def _open(path: Path) -> Manifest | str:
    """The manifest of a checkpoint, or what is wrong with it at a glance."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    if step_of(path.name) not in (None, manifest.step):
        return f"{MANIFEST_FILE} is of step {manifest.step}"
    if STATE_FILE not in manifest.files:
        return f"{MANIFEST_FILE} names no {STATE_FILE}"
    return "; ".join(strangers(path, manifest.files)) or manifest


def _went_back(checkpoint: Path, resume: str) -> bool:
    """Whether it was saved after the run was told to go back to the same checkpoint."""
    try:
        return Checkpoints.read_state(checkpoint)["config"]["checkpoint"]["resume"] == resume
    except (OSError, ValueError, LookupError, TypeError):  # damaged: `newest_sound` is for those that are wanted
        return False


def _elsewhere(path: Path) -> list[Path]:
    """Checkpoints at a path outside of the run: itself, or those in a run folder or its `checkpoints`, newest first."""
    if (path / MANIFEST_FILE).is_file() or (path / STATE_FILE).is_file():
        return [path]
    for folder in (path, path / "checkpoints"):
        found = [one for _, one in reversed(checkpoints_in(folder))]
        if found:
            return found
    return []


def _no_checkpoint(resume: str) -> UserError:
    fix = 'give a folder checkpoints/step-..., a run folder, "auto" or "never"'
    name = Path(resume).name
    if SET_ASIDE in name and Path(resume).is_dir():
        fix = f"to go back to a checkpoint that was set aside, rename it to {name.partition(SET_ASIDE)[0]}"
    return UserError("there is no checkpoint at this path", f"checkpoint.resume = {resume}", fix)


def _on_main(processes: Processes, action: Callable[[], object]) -> str | None:
    """Does it on rank 0; returns on every rank None, or what the file system said against it."""
    outcome = _result_or_trouble(action) if processes.is_main else None
    outcome = processes.gather_objects(outcome if isinstance(outcome, str) else None)[0]
    return outcome and f"rank 0: {outcome}"


def _result_or_trouble(action: Callable[[], Any]) -> Any:
    """What `action` returns, or the text of its OSError. Everything else that it raises is a defect."""
    try:
        return action()
    except OSError as error:
        return told(error)
