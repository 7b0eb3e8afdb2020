"""Numbers of a run before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mftcoder_coba.config import Config
from mftcoder_coba.data import TrainSchedule


@dataclass(frozen=True)
class StepPlan:
    """How the data becomes steps.

    rows_per_epoch is that of the first epoch; later ones differ by a few rows, since each is packed in its own order.
    end_row is where the data ends; the last step's rows beyond it are empty. None: `max_steps` comes first.
    """

    world_size: int
    global_batch_rows: int
    accumulation_steps: int
    rows_per_epoch: int
    total_steps: int
    warmup_steps: int
    end_row: int | None

    @property
    def epochs(self) -> float:
        """Passes over the data that all steps make."""
        return self.total_steps * self.global_batch_rows / self.rows_per_epoch if self.end_row is None else self.end_row / self.rows_per_epoch


def plan_steps(config: Config, schedule: TrainSchedule, world_size: int, accumulation_steps: int) -> StepPlan:
    """Steps of a run from its config and its training data."""
    training = config.training
    total_steps, end_row = training.max_steps, None
    if training.epochs is not None:
        rows = schedule.rows_until(training.epochs)
        from_epochs = math.ceil(rows / training.global_batch_rows)
        if total_steps is None or from_epochs <= total_steps:
            total_steps, end_row = from_epochs, rows
    assert total_steps is not None  # the config demands epochs or max_steps
    warmup = training.warmup_steps
    return StepPlan(
        world_size=world_size,
        global_batch_rows=training.global_batch_rows,
        accumulation_steps=accumulation_steps,
        rows_per_epoch=schedule.rows_in_epoch(0),
        total_steps=total_steps,
        warmup_steps=round(warmup * total_steps) if warmup < 1 else round(warmup),
        end_row=end_row,
    )
