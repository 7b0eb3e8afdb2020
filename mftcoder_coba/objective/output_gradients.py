"""Gradients of the tasks' mean losses with respect to the output layer, without a backward pass.

The layer is z = W h + b, the logits are f(z) (`OutputTransform`). The gradient of task k's mean loss is a sum over its
supervised tokens i in the global batch:

    dW_k = sum_i e_i h_i^T,   db_k = sum_i e_i,   e_i = (loss weight_i / N_k) f'(z_i) (softmax(f(z_i)) - one-hot(label_i))

So the last hidden states h_i of the forward passes, which are there anyway, are all that it takes. K gradients of the
layer's size are never held: norms and inner products are sums over the vocabulary, and the gradients are formed for some
rows of W at a time. Rows are summed over ranks so that each rank gets some of them whole, which is half the traffic of
giving all to all; what the ranks add up of theirs is summed over ranks in the end. It costs two products of the size of
the output layer's forward pass, and sends K times the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mftcoder_coba.objective.linear_cross_entropy import CHUNK_ELEMENTS, logits_gradient_
from mftcoder_coba.objective.multi_task import OutputLayer, OutputTokens


class Ranks(Protocol):
    """The processes of a run, as far as sums go; see `engine.Processes`."""

    world_size: int

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same bits on every rank."""

    def reduce_scatter_sum(self, values: Tensor) -> Tensor:
        """[world size x n, ...] -> [n, ...]: this rank's part of the sum over ranks."""


@dataclass(frozen=True)
class TaskTokens:
    """This rank's supervised tokens of a global batch, task by task, with the output layer that they met.

    hidden: for each task [tokens, width]. labels, factors, normalisers: for each task [tokens]; a token's factor is its
    loss weight / N_k. present: [K] bool, whether the global batch holds the task.
    """

    layer: OutputLayer
    hidden: Sequence[Tensor]
    labels: Sequence[Tensor]
    factors: Sequence[Tensor]
    normalisers: Sequence[Tensor]
    present: np.ndarray

    @classmethod
    def of(cls, passes: Sequence[OutputTokens], layer: OutputLayer, denominators: np.ndarray) -> TaskTokens:
        """From the forward passes of this rank; `denominators` [K] float64 are the N_k of the global batch."""
        chosen = [[one.task_ids == task for one in passes] for task in range(len(denominators))]

        def by_task(values: list[Tensor]) -> list[Tensor]:
            return [torch.cat([part[mask] for part, mask in zip(values, masks, strict=True)]) for masks in chosen]

        weights = by_task([one.loss_weights for one in passes])
        return cls(
            layer=layer,
            hidden=by_task([one.hidden for one in passes]),
            labels=by_task([one.labels for one in passes]),
            # A task that is absent has no tokens either.
            factors=[(part.double() / max(count, 1e-300)).float() for part, count in zip(weights, denominators.tolist(), strict=True)],
            normalisers=by_task([one.normalisers for one in passes]),
            present=denominators > 0,
        )

    def together(self) -> TaskTokens:
        """As one task, whose gradient is the sum of theirs."""
        hidden, labels, factors, normalisers = ([torch.cat(list(parts))] for parts in (self.hidden, self.labels, self.factors, self.normalisers))
        return TaskTokens(self.layer, hidden, labels, factors, normalisers, self.present.any(keepdims=True))


def gradient_norms(tokens: TaskTokens, ranks: Ranks, chunk_elements: int = CHUNK_ELEMENTS) -> np.ndarray:
    """[K] float64 Euclidean norms of the tasks' gradients (weight and bias), NaN for absent tasks; the same bits on every
    rank. To be called on all ranks."""
    count = _rows_at_a_time(tokens, len(tokens.hidden), ranks, chunk_elements)
    squares = sum(torch.linalg.vector_norm(rows, dim=(0, 2), dtype=torch.float64).square() for rows in _rows(tokens, count, ranks, chunk_elements))
    return np.where(tokens.present, ranks.all_reduce_sum(squares).sqrt().cpu().numpy(), np.nan)


def gradient_products(tokens: TaskTokens, others: TaskTokens, ranks: Ranks, chunk_elements: int = CHUNK_ELEMENTS) -> np.ndarray:
    """[K] float64 inner products of each task's gradient of `tokens` with the sum of those of `others`, NaN for tasks that
    are absent from `tokens`; the same bits on every rank. To be called on all ranks."""
    others = others.together()
    count = _rows_at_a_time(tokens, len(tokens.hidden) + 1, ranks, chunk_elements)
    pairs = zip(_rows(tokens, count, ranks, chunk_elements), _rows(others, count, ranks, chunk_elements), strict=True)
    products = sum((rows * other).sum((0, 2), dtype=torch.float64) for rows, other in pairs)
    return np.where(tokens.present, ranks.all_reduce_sum(products).cpu().numpy(), np.nan)


def _rows_at_a_time(tokens: TaskTokens, gradients: int, ranks: Ranks, chunk_elements: int) -> int:
    """Rows of the vocabulary whose gradients are held at one time, a multiple of the world size."""
    vocabulary, width = tokens.layer.weight.shape
    per_rank = chunk_elements // (gradients * (width + 1) * ranks.world_size)
    return ranks.world_size * min(max(1, per_rank), -(-vocabulary // ranks.world_size))


def _rows(tokens: TaskTokens, count: int, ranks: Ranks, chunk_elements: int) -> Iterator[Tensor]:
    """This rank's rows of the tasks' gradients, [count / world size, K, width + 1] float32 at a time, summed over ranks; the
    last column is the bias. The number of chunks depends on the vocabulary alone, so all ranks make the same."""
    weight = tokens.layer.weight
    vocabulary, width = weight.shape
    for first in range(0, vocabulary, count):
        # Rows beyond the vocabulary's end stay 0.
        gradients = torch.zeros(count, len(tokens.hidden), width + 1, dtype=torch.float32, device=weight.device)
        for task in range(len(tokens.hidden)):
            _add_gradient(gradients[: vocabulary - first, task], tokens, task, first, max(1, chunk_elements // count))
        yield ranks.reduce_scatter_sum(gradients)


def _add_gradient(gradient: Tensor, tokens: TaskTokens, task: int, first: int, chunk_tokens: int) -> None:
    """Adds one task's gradient of this rank for the rows from `first` on to `gradient` [rows, width + 1] float32."""
    layer, rows = tokens.layer, slice(first, first + len(gradient))
    weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
    columns = (tokens.hidden[task], tokens.labels[task], tokens.factors[task], tokens.normalisers[task])
    for hidden, labels, factors, normalisers in zip(*(column.split(chunk_tokens) for column in columns), strict=True):
        logits = layer.transform.apply_(F.linear(hidden, weight, bias).float())
        # As in training: products in the layer's dtype, chunks added up in float32.
        errors = logits_gradient_(logits, normalisers, labels, factors, layer.transform, first).to(weight.dtype)
        if weight.dtype == torch.float32:
            gradient[:, :-1].addmm_(errors.t(), hidden)
        else:
            gradient[:, :-1] += errors.t() @ hidden
        if bias is not None:
            gradient[:, -1] += errors.sum(0, dtype=torch.float32)
