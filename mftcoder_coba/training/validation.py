"""Per-task validation losses: of the whole validation set, and of one mini-batch for the balancer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mftcoder_coba.data import BalancerStream, Batch, Row, TaskData, collate, validation_rows
from mftcoder_coba.engine import Engine
from mftcoder_coba.training.step import losses_of


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

    def full(self) -> tuple[np.ndarray, np.ndarray]:
        """(losses [K], NaN for tasks without validation data; supervised tokens [K]) of the whole set."""
        return self.losses(self.rows)

    def mini_batch(self, stream: BalancerStream, observation: int) -> tuple[np.ndarray, np.ndarray]:
        """(losses [K], slots [K]) of the balancer's mini-batch number `observation`."""
        rows, slots = stream.mini_batch(observation)
        return self.losses(rows)[0], slots

    def losses(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """(losses [K], supervised tokens [K]) of rows that are dealt out to the ranks. One all-reduce."""
        processes, tasks = self.engine.processes, len(self.data)
        # Rows are spread evenly, and every rank makes the same number of forward passes: ZeRO-3 gathers parameters in each.
        per_rank = -(-len(rows) // processes.world_size)
        passes = max(1, -(-per_rank // self.rows_per_batch))
        width = -(-per_rank // passes)

        def batches() -> Iterator[Batch]:
            for index in range(passes):
                start = (index * processes.world_size + processes.rank) * width
                part = rows[start : start + width]
                yield collate(
                    part, self.data, tasks, self.pad_token_id, "token", max(1, len(part)), max_length=self.sequence_length, isolate=self.isolate
                )

        with self.engine.evaluating():
            return losses_of(self.engine, batches())
