"""The tokenised samples of one split of one task, read where they lie: on disk."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # number of the file that the sample is from
        ("line", pa.int64()),  # its line there, from 1
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.int32())),  # [start, end) of each supervised run of tokens, flat
        ("supervised_tokens", pa.int32()),
    ]
)


def spans_of(mask: np.ndarray) -> np.ndarray:
    """bool [length] -> int32 [2 x runs]: start and end of each run of True."""
    fenced = np.zeros(len(mask) + 2, np.bool_)
    fenced[1:-1] = mask
    return np.flatnonzero(fenced[1:] != fenced[:-1]).astype(np.int32)


class _Column(NamedTuple):
    """Where the numbers of a record batch's column are in the file, in bytes; `offsets` of a list column, else 0."""

    values: int
    offsets: int = 0


class TaskData:
    """Samples by number. Only `lengths` and `supervised` are held in memory.

    The file is mapped to find the columns, and let go. Samples are then read by their position: pages of a map that were
    touched count as this process's memory, and a kernel may map 2 MiB at a touch.

    Attributes:
        lengths: int32 [samples], tokens of each sample.
        supervised: int32 [samples], tokens that can be learned: supervised ones but for a first token, which nothing predicts.
    """

    def __init__(self, stream: BinaryIO, files: Sequence[Path]):
        """Args:
        stream: a real file that holds an Arrow stream of `SCHEMA`; it stays open.
        files: the names of the files that the samples are from, by number.
        """
        self._stream, self._files = stream, files
        with pa.memory_map(f"/proc/self/fd/{stream.fileno()}") as memory_map:
            start = memory_map.read_buffer(1).address
            memory_map.seek(0)
            batches = [batch for batch in pa.ipc.open_stream(memory_map) if batch.num_rows]
            self._starts = np.cumsum([0] + [batch.num_rows for batch in batches]).tolist()
            self._columns = [{name: _place(batch.column(name), start) for name in SCHEMA.names} for batch in batches]
            self.lengths = _joined([np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in batches])
            self.supervised = _joined([batch.column("supervised_tokens").to_numpy() for batch in batches])

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> TaskData:
        """From (ids [length], supervised [length]) pairs, by way of a file that nobody else sees."""
        samples = list(samples)
        columns = {
            "file": [0] * len(samples),
            "line": range(1, len(samples) + 1),
            "input_ids": [np.asarray(ids, np.int32) for ids, _ in samples],
            "supervised": [spans_of(np.asarray(mask, np.bool_)) for _, mask in samples],
            "supervised_tokens": [int(np.count_nonzero(mask[1:])) for _, mask in samples],
        }
        stream = tempfile.TemporaryFile()
        with pa.ipc.new_stream(stream, SCHEMA) as writer:
            writer.write_table(pa.table(columns, schema=SCHEMA))
        stream.flush()
        return cls(stream, [Path("samples")])

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [length], read-only; supervised bool [length])."""
        columns, row = self._find(index)
        document = self._read_list(columns["input_ids"], row)
        mask = np.zeros(len(document), np.bool_)
        runs = self._read_list(columns["supervised"], row).tolist()
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            mask[start:end] = True
        return document, mask

    def source(self, index: int) -> str:
        """`file:line` of the sample."""
        columns, row = self._find(index)
        (file,) = self._read(np.int32, columns["file"].values, row, 1)
        (line,) = self._read(np.int64, columns["line"].values, row, 1)
        return f"{self._files[file]}:{line}"

    def _find(self, index: int) -> tuple[dict[str, _Column], int]:
        """(the columns of its record batch, its row there)"""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        return self._columns[batch], index - self._starts[batch]

    def _read_list(self, column: _Column, row: int) -> np.ndarray:
        start, end = self._read(np.int32, column.offsets, row, 2).tolist()
        return self._read(np.int32, column.values, start, end - start)

    def _read(self, kind: type, position: int, first: int, count: int) -> np.ndarray:
        """`count` numbers, the first one being number `first` from `position` on."""
        size = np.dtype(kind).itemsize
        data = os.pread(self._stream.fileno(), count * size, position + first * size)
        if len(data) != count * size:
            raise EOFError(f"the file of the tokens ends before byte {position + (first + count) * size}: {self._stream.name}")
        return np.frombuffer(data, kind)


def _place(column: pa.Array, start: int) -> _Column:
    if pa.types.is_list(column.type):
        return _Column(column.values.buffers()[1].address - start, column.offsets.buffers()[1].address - start)
    return _Column(column.buffers()[1].address - start)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32) if arrays else np.zeros(0, np.int32)
