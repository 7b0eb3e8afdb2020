"""The tokenised samples of one split of one task, read where they lie: in the memory map."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.int32())),  # [start, end) of each supervised run of tokens, flat
        ("supervised_tokens", pa.int32()),
    ]
)


def spans_of(mask: np.ndarray) -> np.ndarray:
    """bool [length] -> int32 [2 x runs]: start and end of each run of True."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).astype(np.int32)


class TaskData:
    """Samples by number. Only `lengths` and `supervised` are held in memory; ids stay in the map.

    Attributes:
        lengths: int32 [samples], tokens of each sample.
        supervised: int32 [samples], tokens that can be learned: supervised ones but for a first token, which nothing predicts.
    """

    def __init__(self, table: pa.Table):
        """Args: table: of `SCHEMA`."""
        batches = [batch for batch in table.select(SCHEMA.names).to_batches() if batch.num_rows]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in batches]).tolist()
        columns = [[_views(batch.column(name)) for name in ("input_ids", "supervised")] for batch in batches]
        self._chunks = [(*ids, *spans) for ids, spans in columns]
        self.lengths = _joined([np.diff(offsets) for offsets, *_ in self._chunks])
        self.supervised = _joined([batch.column("supervised_tokens").to_numpy() for batch in batches])

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> TaskData:
        """From (ids [length], supervised [length]) pairs in memory."""
        samples = list(samples)
        columns = [
            pa.array([np.asarray(ids, np.int32) for ids, _ in samples], SCHEMA.field(0).type),
            pa.array([spans_of(np.asarray(mask, np.bool_)) for _, mask in samples], SCHEMA.field(1).type),
            pa.array([int(np.count_nonzero(mask[1:])) for _, mask in samples], pa.int32()),
        ]
        return cls(pa.table(columns, schema=SCHEMA))

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [length], a read-only view of the map; supervised bool [length])."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        chunk = bisect_right(self._starts, index) - 1
        offsets, ids, span_offsets, spans = self._chunks[chunk]
        row = index - self._starts[chunk]
        document = ids[offsets[row] : offsets[row + 1]]
        mask = np.zeros(len(document), np.bool_)
        runs = spans[span_offsets[row] : span_offsets[row + 1]].tolist()
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            mask[start:end] = True
        return document, mask


def _views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int32 [rows + 1], values int32) of a list column, without a copy."""
    return column.offsets.to_numpy(zero_copy_only=True), column.values.to_numpy(zero_copy_only=True)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32) if arrays else np.zeros(0, np.int32)
