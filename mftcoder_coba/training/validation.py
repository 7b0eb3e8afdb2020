"""Per-task validation losses: of the whole validation set, and of one mini-batch for the balancer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mftcoder_coba.data import Batch, Row, TaskData, collate, validation_rows
from mftcoder_coba.engine import Engine
from mftcoder_coba.training.step import TaskLosses, losses_of


class Validation:
    """Losses of the validation split, the same on every rank. They are always means over tokens.

    Args:
        data: the validation split of each task.
        rows_per_batch: rows of one forward pass on one rank.
    """

    def __init__(self, engine: Engine, data: Sequence[TaskData], sequence_length: int, packing: str, rows_per_batch: int, pad_token_id: int):
        self.engine, self.data = engine, data
        self.rows_per_batch, self.pad_token_id = rows_per_batch, pad_token_id
        self.sequence_length, self.isolate = sequence_length, packing != "none"
        self.rows = validation_rows([task.lengths for task in data], sequence_length, packing)

    def full(self) -> TaskLosses:
        """Of the whole set; the loss of a task without validation data is NaN."""
        return self.losses(self.rows)

    def losses(self, rows: Sequence[Row]) -> TaskLosses:
        """Of rows that are dealt out to the ranks. One all-reduce."""
        with self.engine.evaluating():
            return losses_of(self.engine, self.batches(rows))

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """This rank's part of the rows. All ranks get the same number of batches: ZeRO-3 gathers parameters in each pass."""
        processes = self.engine.processes
        per_rank = -(-len(rows) // processes.world_size)
        passes = max(1, -(-per_rank // self.rows_per_batch))
        width = -(-per_rank // passes)
        for index in range(passes):
            start = (index * processes.world_size + processes.rank) * width
            part = rows[start : start + width]
            yield collate(
                part,
                self.data,
                len(self.data),
                self.pad_token_id,
                "token",
                max(1, len(part)),
                max_length=self.sequence_length,
                isolate=self.isolate,
            )
