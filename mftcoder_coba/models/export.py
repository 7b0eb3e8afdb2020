"""A trained model as users load it: a Hugging Face folder, or a PEFT adapter folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor, nn


def write_export(model: nn.Module, state: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Writes the model and its tokenizer; an older export in `folder` is replaced only by a complete new one.

    Args:
        model: the Hugging Face or PEFT model; its own tensors are not read, they may be partitioned.
        state: full tensors by the model's parameter names: all of them, or the trainable ones for an adapter.
    """
    aside = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(aside)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
