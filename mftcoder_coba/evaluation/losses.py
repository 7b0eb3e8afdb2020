"""Loss and perplexity of each task: sum of the token losses / number of supervised tokens, over all of a split, computed as in training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mftcoder_coba.config import Config
from mftcoder_coba.data import Batch, Row, collate, validation_rows
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.loading import EvaluationData
from mftcoder_coba.evaluation.showing import progress_bar
from mftcoder_coba.objective import MultiTaskObjective

LARGEST_EXPONENT = 700.0  # a larger loss has a perplexity beyond float64


@torch.no_grad()
def task_losses(model: nn.Module, data: EvaluationData, config: Config, rows_per_batch: int) -> dict[str, dict[str, Any]]:
    """Of each task {"samples", "tokens" (supervised ones), "loss", "perplexity"}. The loss is NaN or infinite where the model's is.

    Args:
        model: as `loading.load` returns it.
        config: its `data` section says how rows are packed.
        rows_per_batch: rows of one forward pass.

    Raises:
        UserError: the model's output layer is not one that is known here; a GPU has too little memory.
    """
    objective, device = checked_objective(model, data, len(data.tasks))
    rows = validation_rows([split.lengths for split in data.splits], config.data.sequence_length, config.data.packing)
    sums = torch.zeros(len(data.tasks), dtype=torch.float64, device=device)
    tokens = [0] * len(data.tasks)
    for _, batch in batches(rows, data, config, rows_per_batch, "evaluating"):
        with memory_told(batch):
            sums += objective(*inputs_of(batch, device), None)[1]
        tokens = [total + int(more) for total, more in zip(tokens, batch.tokens, strict=True)]
    return {task: _numbers(len(split), *of) for task, split, *of in zip(data.tasks, data.splits, tokens, sums.tolist(), strict=True)}


def mean_loss(measured: dict[str, dict[str, Any]]) -> float:
    """The plain mean over the tasks."""
    return sum(task["loss"] for task in measured.values()) / len(measured)


def checked_objective(model: nn.Module, data: EvaluationData, sums: int) -> tuple[MultiTaskObjective, torch.device]:
    """The objective around the model, with so many sums of losses; and the model's device.

    Raises:
        UserError: the model's output layer is not one that is known here.
    """
    device = next(model.parameters()).device
    objective = MultiTaskObjective(model, sums)
    first = torch.tensor([data.first_tokens], device=device)
    objective.check_output_layer(first, torch.arange(first.shape[1], device=device)[None])
    return objective, device


def batches(rows: Sequence[Row], data: EvaluationData, config: Config, rows_per_batch: int, what: str) -> Iterator[tuple[Sequence[Row], Batch]]:
    """The rows in batches, beside what they hold as tensors; with a bar on a terminal that is headed `what`."""
    with progress_bar() as bar:
        for start in bar.track(range(0, len(rows), rows_per_batch), description=what):
            part = rows[start : start + rows_per_batch]
            yield (
                part,
                collate(
                    part,
                    data.splits,
                    len(data.tasks),
                    data.pad_token_id,
                    "token",
                    max_length=config.data.sequence_length,
                    isolate=config.data.packing != "none",
                ),
            )


def inputs_of(batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What the objective is given, in its order."""
    tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights)
    return tuple(values.to(device) for values in tensors)


@contextlib.contextmanager
def memory_told(batch: Batch) -> Iterator[None]:
    """Raises UserError where a GPU has too little memory for the batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, length = batch.input_ids.shape
        raise UserError(f"the GPU's memory does not suffice for {rows} rows of {length} tokens", "--batch-rows", "give a smaller number") from error


def _numbers(samples: int, tokens: int, loss_sum: float) -> dict[str, Any]:
    loss = loss_sum / tokens
    return {"samples": samples, "tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
