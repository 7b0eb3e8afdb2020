"""Room for checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mftcoder_coba.config import Config
from mftcoder_coba.models import count_parameters
from mftcoder_coba.planning.empty_model import architecture_of, empty_model

STATE_BYTES = 12  # of a trained parameter in a checkpoint: itself and AdamW's two moments, in float32


def needed_bytes(config: Config) -> int:
    """What a run may have on the disk at once: the newest `keep` checkpoints, the best one, the one that is being written, and two exports (one is
    replaced by the next). The rest of a run folder is small.

    Raises:
        UserError: the model's config cannot be read, or the adapter does not fit it.
    """
    total, trainable = count_parameters(empty_model(config, architecture_of(config), checkpointing=False))
    exported = (trainable if config.adapter else total) * getattr(torch, config.model.dtype).itemsize
    return (config.checkpoint.keep + 2) * trainable * STATE_BYTES + 2 * exported


def free_bytes(folder: Path) -> int:
    """Of the file system on which the folder is, or would be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
