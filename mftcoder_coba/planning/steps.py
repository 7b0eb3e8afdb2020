"""Rows and steps of a run before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mftcoder_coba.config import Config
from mftcoder_coba.data import BalancerStream, TaskData, TrainSchedule, shares_of
from mftcoder_coba.errors import UserError


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


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches of one step on one rank.

    Raises:
        UserError: the rows of a step cannot be divided among the ranks.
    """
    training = config.training
    rows_at_once = training.micro_batch_rows * world_size
    if training.global_batch_rows % rows_at_once:
        raise UserError(
            f"global_batch_rows ({training.global_batch_rows}) is not a multiple of micro_batch_rows x ranks "
            f"({training.micro_batch_rows} x {world_size} = {rows_at_once})",
            "training.global_batch_rows",
            f"for {world_size} ranks take a multiple of {world_size} for global_batch_rows and a micro_batch_rows that divides the quotient",
        )
    return training.global_batch_rows // rows_at_once


def plan_steps(config: Config, schedule: TrainSchedule, world_size: int) -> StepPlan:
    """Steps of a run from its config and its training data.

    Raises:
        UserError: see `accumulation_steps`.
    """
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
        accumulation_steps=accumulation_steps(config, world_size),
        rows_per_epoch=schedule.rows_in_epoch(0),
        total_steps=total_steps,
        warmup_steps=round(warmup * total_steps) if warmup < 1 else round(warmup),
        end_row=end_row,
    )


def training_schedule(config: Config, train: list[TaskData]) -> TrainSchedule:
    """The order of the training rows, from the config and the samples of each task."""
    data, sizes = config.data, [len(task) for task in train]
    shares = shares_of([task.share for task in data.tasks], sizes, data.temperature)
    return TrainSchedule([task.lengths for task in train], shares, config.run.order_seed, data.sequence_length, data.packing)


def balancer_stream(config: Config, valid: list[TaskData], rows: int) -> BalancerStream | None:
    """The balancer's validation mini-batches of `rows` rows over all ranks; None if a task has no validation data."""
    if not all(len(task) for task in valid):
        return None
    return BalancerStream([task.lengths for task in valid], config.run.seed, config.data.sequence_length, config.data.packing, rows)


def step_lines(config: Config, plan: StepPlan, stream: BalancerStream | None, stream_rows: int) -> list[str]:
    """The numbers of steps and validation, each with its calculation, a line each. `config.balancer` has its numbers, not "auto"."""
    training, validation = config.training, config.validation
    lines = [
        f"a step      {plan.global_batch_rows} rows = {training.micro_batch_rows} in a micro-batch x {plan.world_size} ranks "
        f"x {plan.accumulation_steps} micro-batches; a row has at most {config.data.sequence_length} tokens",
        f"steps       {plan.total_steps} = {plan.epochs:.2f} epochs of {plan.rows_per_epoch:,} rows; learning rate rises over {plan.warmup_steps}",
    ]
    if stream:
        slots = ", ".join(f"{name} {count}" for name, count in zip(config.data.task_names, stream.slots_per_task, strict=True))
        lines.append(
            f"validation  every {validation.every_steps} steps; "
            f"M = {stream.coverage} balancer mini-batches of about {stream_rows} rows cover the data ({slots})"
        )
    if config.balancer.kind == "coba":
        window, warmup, interval = config.balancer.window, config.balancer.warmup, config.balancer.update_interval
        lines.append(f"coba        slopes over N = {window} observations, weights from observation W = {warmup} on, one every {interval} steps")
        if warmup * interval >= plan.total_steps:
            lines.append(
                f"warning     the run ends at step {plan.total_steps}, before CoBa's warm-up of {warmup * interval} steps: all weights stay equal. "
                "Raise validation.balancer_rows_per_rank, or lower balancer.warmup"
            )
    return lines
