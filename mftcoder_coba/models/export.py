"""A trained model as users load it: a Hugging Face folder, or a PEFT adapter folder.

export/       complete, or absent
export.new/   one that is being written
export.old/   the one before, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from mftcoder_coba.errors import UserError


def write_export(model: nn.Module, state: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Writes the model and its tokenizer; an older export in `folder` is replaced only by a complete new one that is on the disk.

    Args:
        model: the Hugging Face or PEFT model; its own tensors are not read, they may be partitioned.
        state: full tensors by the model's parameter names: all of them, or the trainable ones for an adapter.

    Raises:
        OSError: it cannot be written (a full disk); the older export is as it was, and nothing else is left.
    """
    recover_export(folder)
    new, old = _beside(folder)
    with _put_in_place(new, old, folder):
        new.mkdir(parents=True)
        model.save_pretrained(new, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(new)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write to, which becomes `folder` at the end of the block, complete and on the disk; an error leaves nothing.

    Raises:
        UserError: something is in `folder`.
        OSError: it cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError("there is something here already; it is not overwritten", str(folder), "name a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = aside / "new"
        with _put_in_place(new, aside / "old", folder):
            new.mkdir()
            yield new
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def recover_export(folder: Path) -> None:
    """Puts right what a killed or failed `write_export` left: the older export is back if no new one took its place.

    Raises:
        OSError: it cannot be renamed.
    """
    _put_right(*_beside(folder), folder)


@contextlib.contextmanager
def _put_in_place(new: Path, old: Path, folder: Path) -> Iterator[None]:
    """What the block writes to `new` takes the place of `folder`, which becomes `old`; an error leaves `folder` as it was, and nothing else."""
    try:
        yield
        _bring_to_disk(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        _fsync(folder.parent)
    except Exception as error:
        _put_right(new, old, folder)
        refused = _refused_by_the_system(error, folder)
        if refused:
            raise refused from error
        raise


def _put_right(new: Path, old: Path, folder: Path) -> None:
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _refused_by_the_system(error: Exception, folder: Path) -> OSError | None:
    """The libraries that write tensors and tokenizers have errors of their own for what the system refused; they name its number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) if number else None


def _bring_to_disk(folder: Path) -> None:
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)  # safetensors makes files that their owner alone may read; a server often is another user
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
