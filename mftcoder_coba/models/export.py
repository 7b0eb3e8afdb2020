"""A trained model as users load it: a Hugging Face folder, or a PEFT adapter folder.

export/       complete, or absent
export.new/   one that is being written
export.old/   the one before, for the moment between two renames
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from torch import Tensor, nn


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
    try:
        new.mkdir(parents=True)
        model.save_pretrained(new, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(new)
        _bring_to_disk(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        _fsync(folder.parent)
    except Exception as error:
        recover_export(folder)
        refused = _refused_by_the_system(error, folder)
        if refused:
            raise refused from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_export(folder: Path) -> None:
    """Puts right what a killed or failed `write_export` left: the older export is back if no new one took its place.

    Raises:
        OSError: it cannot be renamed.
    """
    new, old = _beside(folder)
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
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
