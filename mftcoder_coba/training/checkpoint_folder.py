"""The folder `checkpoints` of a run, as one process sees it: names, publishing by rename, pruning, `latest`.

    step-000100/    a checkpoint; it was complete when it got this name
    latest          link to the newest complete one, for people and tools

What has another ending is on its way:

    .partial     being written; removed by the next save
    .replaced    the former checkpoint of a step that is saved again: counts as long as there is no other one of that step
    .removing    being removed
    .set-aside   of a later step than the one that the run went back to: kept for its owner, never used, never removed
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

LATEST = "latest"
PARTIAL, REPLACED, REMOVING, SET_ASIDE = ".partial", ".replaced", ".removing", ".set-aside"
_LEFTOVER = re.compile(rf"(step-\d{{6,}}(\{REPLACED})?|{LATEST})(\{PARTIAL}|\{REMOVING})")


class CheckpointFolder:
    """Only rank 0 calls what changes something. Raises OSError where the file system refuses, except where it says that it warns."""

    def __init__(self, path: Path):
        self.path = path

    def of(self, step: int) -> Path:
        return self.path / step_name(step)

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, sound or not, oldest first."""
        return [step for step, _ in checkpoints_in(self.path)]

    def aside(self, step: int) -> Path:
        """Where the checkpoint of `step` is written, from `begin` to `publish` or `discard`."""
        return _ending(self.of(step), PARTIAL)

    def begin(self, step: int) -> None:
        """Makes an empty folder `aside(step)`. What earlier saves left is removed first: it may take the space that is needed."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            sync_folder(self.path.parent)
        for path in self.path.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                _or_warn(f"{path}, left by an earlier save, could not be removed", lambda path=path: _delete(path))
        self.aside(step).mkdir()

    def publish(self, step: int) -> None:
        """`aside(step)`, which is complete and flushed, becomes the checkpoint of `step`.

        There may be one of that step already. Whatever happens in between, one of the two is found again.
        """
        target = self.of(step)
        replaced = _ending(target, REPLACED)
        if target.exists():
            self._remove(replaced)
            if self._latest() == target.name:
                self._point_latest(None)  # it would point to nothing for a moment
            os.rename(target, replaced)
        try:
            os.rename(self.aside(step), target)
        except OSError:
            self.recover()
            raise
        sync_folder(self.path)

    def discard(self, step: int) -> None:
        """Removes `aside(step)`; warns if it cannot."""
        _or_warn(f"{self.aside(step)} could not be removed", lambda: _delete(self.aside(step)))

    def tidy(self, step: int, best_step: int | None, keep: int) -> None:
        """After `step` was published: moves `latest`, removes what is no longer needed; warns if it cannot.

        Args:
            best_step, keep: the checkpoint of that step, and the `keep` newest ones stay. Those of later steps than `step` are not judged here.
        """
        for other in self.steps():
            replaced = _ending(self.of(other), REPLACED)
            if self.of(other).exists():
                _or_warn(f"{replaced} could not be removed", lambda replaced=replaced: self._remove(replaced))
        _or_warn(f"{self.path / LATEST} could not be moved", lambda: self._point_latest(step))
        own = [other for other in self.steps() if other <= step]
        for old in own[:-keep]:
            if old != best_step and step_name(old) != self._latest():
                _or_warn(f"{self.of(old)} could not be removed", lambda old=old: self._remove_step(old))

    def recover(self) -> None:
        """Puts back checkpoints that were being replaced when the run was killed, and whose successor is not there."""
        waiting = [path for step, path in checkpoints_in(self.path) if path != self.of(step)]
        for path in waiting:
            os.rename(path, path.with_suffix(""))
        if waiting:
            sync_folder(self.path)

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the checkpoints of later steps; returns their new names, newest first."""
        later = [(other, path) for other, path in reversed(checkpoints_in(self.path)) if other > step]
        if later:
            # First, so that it never points to one that is set aside.
            self._point_latest(step if self.of(step).exists() else None)
        names = []
        for other, path in later:
            if path == self.of(other):
                self._remove(_ending(path, REPLACED))  # it would count again, alone
            first = f"{step_name(other)}{SET_ASIDE}"
            name, number = first, 2
            while (self.path / name).exists():
                name, number = f"{first}-{number}", number + 1
            os.rename(path, self.path / name)
            names.append(name)
        if names:
            sync_folder(self.path)
        return names

    def _latest(self) -> str | None:
        """What `latest` points to."""
        link = self.path / LATEST
        return os.readlink(link) if link.is_symlink() else None

    def _point_latest(self, step: int | None) -> None:
        link = self.path / LATEST
        if step is None:
            link.unlink(missing_ok=True)
            return
        aside = _ending(link, PARTIAL)
        aside.unlink(missing_ok=True)
        os.symlink(step_name(step), aside)
        os.replace(aside, link)

    def _remove_step(self, step: int) -> None:
        self._remove(_ending(self.of(step), REPLACED))
        self._remove(self.of(step))

    @staticmethod
    def _remove(path: Path) -> None:
        """By a rename first: half a checkpoint never looks like one. Nothing happens if it is not there."""
        if path.exists():
            removing = _ending(path, REMOVING)
            _delete(removing)
            os.rename(path, removing)
            _delete(removing)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for other names."""
    digits = name.removeprefix("step-").removesuffix(REPLACED)
    step = int(digits) if digits.isdecimal() and digits.isascii() else -1
    return step if name.removesuffix(REPLACED) == step_name(step) else None


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in a folder `checkpoints`, sound or not, oldest first. One that was being replaced counts if it is alone."""
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    # The longer name, that of a replaced one, comes after the other.
    for path in sorted(folder.iterdir()):
        step = step_of(path.name)
        if step is not None and path.is_dir():
            found.setdefault(step, path)
    return sorted(found.items())


def write_file(path: Path, content: bytes) -> None:
    """Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders; they write names through.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def told(error: OSError) -> str:
    """As people read it: what, and where if that is known."""
    text = error.strerror or str(error)
    return f"{text}: {error.filename}" if error.filename else text


def _ending(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _delete(path: Path) -> None:
    """A file, a link, a whole folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _or_warn(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        print(f"warning: {what}: {told(error)}", file=sys.stderr, flush=True)
