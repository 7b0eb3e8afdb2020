"""Per-task validation losses: of the whole validation set, and of one mini-batch for the balancer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mftcoder_coba.data import Batch, Row, TaskData, collate, validation_rows
from mftcoder_coba.engine import Engine
from mftcoder_coba.errors import UserError
from mftcoder_coba.training.step import TaskLosses, losses_of

LOSS_IS_ZERO = "all its answers are certain already: look at its `valid` files, whether they hold answers, and of more than one kind"
NO_LOSS = "the model gives no finite numbers for it: look for damaged weights, for tokens of no meaning in its `valid` files, and at model.dtype"


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


def check_initial_losses(tasks: Sequence[str], measured: TaskLosses) -> None:
    """What every later loss is divided by, whichever balancer is chosen: the early stopping and the report do too.

    Args:
        measured: the full validation before training. A task without validation data has no loss, and is no mistake.

    Raises:
        UserError: the loss of a task is 0 or not finite.
    """
    bad = {
        name: float(loss) for name, loss, tokens in zip(tasks, measured.losses, measured.tokens, strict=True) if tokens and not 0 < loss < math.inf
    }
    if bad:
        told = [f"task {name}: the validation loss before training is {loss:g}; {NO_LOSS if loss else LOSS_IS_ZERO}" for name, loss in bad.items()]
        what = "\n".join([*told, "every later loss is shown and judged as a ratio to this one, which must be a positive number"])
        raise UserError(what, ", ".join(f"data.tasks, {name}" for name in bad), "mend the data or the model, or take the task out of data.tasks")


def ratios_of(tasks: Sequence[str], losses: np.ndarray, initial: np.ndarray) -> dict[str, float]:
    """Loss over that before training of each task that has validation data. NaN where the loss is not finite: such a task is not left out."""
    there = ~np.isnan(initial)
    ratios = np.where(np.isfinite(losses), losses, np.nan) / initial
    return {name: float(ratio) for name, ratio, known in zip(tasks, ratios, there, strict=True) if known}
