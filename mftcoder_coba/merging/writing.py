"""The folder of a merged model: whole, or not there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging.folders import ShardedWriter, Stored
from mftcoder_coba.models.export import whole_folder

# (what is done, its bytes) -> a function that is told the bytes that were done.
Begin = Callable[[str, int], Callable[[int], None]]


@contextlib.contextmanager
def merged_folder(out: Path) -> Iterator[tuple[Path, Begin]]:
    """Gives an empty folder that becomes `out` at the end of the block, and progress bars (on a terminal).

    Raises:
        UserError: `out` is not empty, or cannot be written. As after any other error, nothing is left there.
    """
    try:
        with whole_folder(out) as new, _progress() as begin:
            yield new, begin
    except OSError as error:
        what = f"the merged model cannot be written: {error}"
        raise UserError(what, str(out), "make room, or name another folder; nothing is left there") from error


def write_weights(
    new: Path, stored: Mapping[str, Stored], kinds: Mapping[str, torch.dtype], merged: Callable[[str], Tensor], max_shard_bytes: int, begin: Begin
) -> None:
    """Writes a full model's weights, one tensor at a time.

    Args:
        stored: the tensors by name; of these the shapes.
        kinds: their dtypes in the new files.
        merged: name -> the tensor to write.

    Raises:
        OSError: they cannot be written.
    """
    advance = begin("merging", sum(tensor.bytes for tensor in stored.values()))
    with ShardedWriter(new, {name: (stored[name].shape, kind) for name, kind in kinds.items()}, max_shard_bytes) as writer:
        for name in writer.order:
            writer.write(name, merged(name))
            advance(stored[name].bytes)


@contextlib.contextmanager
def _progress() -> Iterator[Begin]:
    watched = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    columns = (TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not watched) as progress:

        def begin(what: str, size: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=size)
            return lambda done: progress.advance(task, done)

        yield begin
