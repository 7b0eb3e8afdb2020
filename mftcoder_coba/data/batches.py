"""Rows -> tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mftcoder_coba.data.samples import TaskData
from mftcoder_coba.data.schedule import Row

IGNORED = -100  # label of a place where nothing is learned
NO_TASK = -1  # of padding
LENGTH_MULTIPLE = 8  # tensor cores like it


@dataclass(frozen=True)
class Batch:
    """Rows of documents as tensors on the CPU, [rows, length] each.

    Attributes:
        input_ids: int64.
        labels: int64, already shifted: at t stands the token after t of the same document if it is supervised, else -100.
        position_ids: int64, from 0 in each document; padding counts as a document.
        task_ids: int64, the task of the token's document; -1 on padding.
        loss_weights: float32, 0 where nothing is learned; else 1 ("token"), or 1 / supervised tokens of the sample ("sample").
        denominators: float64 [tasks], the exact sum of loss_weights: supervised tokens, or samples that have any.
        tokens: int64 [tasks], supervised tokens.
        total_tokens: tokens that are no padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    task_ids: torch.Tensor
    loss_weights: torch.Tensor
    denominators: np.ndarray
    tokens: np.ndarray
    total_tokens: int


def collate(
    rows: list[Row],
    task_data: list[TaskData],
    num_tasks: int,
    pad_token_id: int,
    reduction: Literal["token", "sample"],
    rows_per_batch: int | None = None,
    length_multiple: int = LENGTH_MULTIPLE,
    max_length: int | None = None,
    isolate: bool = True,
) -> Batch:
    """Lays documents down in rows.

    Args:
        rows: may be empty; rows that are missing to `rows_per_batch` are padding.
        task_data: by task number.
        length_multiple: the length is that of the longest row, rounded up to this and at most `max_length`.
        isolate: False numbers positions straight through the row, so that no block mask is needed: one document a row
            and padding behind it, which causal attention never sees.

    Raises:
        ValueError: more rows than `rows_per_batch`, a row longer than `max_length`, several documents in a row that is not isolated.
    """
    if rows_per_batch is not None and len(rows) > rows_per_batch:
        raise ValueError(f"{len(rows)} rows do not fit into a batch of {rows_per_batch}")
    if not isolate and any(len(row) > 1 for row in rows):
        raise ValueError("documents that share a row must be isolated")
    longest = max((sum(int(task_data[task].lengths[sample]) for task, sample in row) for row in rows), default=0)
    length = padded_length(longest, max_length, length_multiple)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}")

    shape = (len(rows) if rows_per_batch is None else rows_per_batch, length)
    input_ids, labels, task_ids = (np.full(shape, value, np.int64) for value in (pad_token_id, IGNORED, NO_TASK))
    loss_weights = np.zeros(shape, np.float32)
    counting = np.arange(length)
    position_ids = np.broadcast_to(counting, shape).copy()
    denominators, tokens, total_tokens = np.zeros(num_tasks, np.float64), np.zeros(num_tasks, np.int64), 0
    for index, row in enumerate(rows):
        start = 0
        for task, sample in row:
            ids, mask = task_data[task].sample(sample)
            end = start + len(ids)
            input_ids[index, start:end] = ids
            task_ids[index, start:end] = task
            learned = mask[1:]
            count = int(np.count_nonzero(learned))
            if count:
                labels[index, start : end - 1][learned] = ids[1:][learned]
                loss_weights[index, start : end - 1][learned] = 1.0 if reduction == "token" else 1.0 / count
                tokens[task] += count
                denominators[task] += count if reduction == "token" else 1
            if isolate:
                position_ids[index, start:] = counting[: length - start]
            start = end
        if isolate:
            position_ids[index, start:] = counting[: length - start]
        total_tokens += start
    tensors = map(torch.from_numpy, (input_ids, labels, position_ids, task_ids, loss_weights))
    return Batch(*tensors, denominators=denominators, tokens=tokens, total_tokens=total_tokens)


def padded_length(longest: int, limit: int | None, multiple: int = LENGTH_MULTIPLE) -> int:
    """The length of a batch whose longest row has `longest` tokens: rounded up to `multiple`, at most `limit`."""
    rounded = max(1, -(-longest // multiple)) * multiple
    return rounded if limit is None else min(rounded, limit)
