"""The loss of single training samples: how well does a model know each of them?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mftcoder_coba.config import Config
from mftcoder_coba.data import Row, TaskData, validation_rows
from mftcoder_coba.evaluation.loading import EvaluationData
from mftcoder_coba.evaluation.losses import batches, checked_objective, inputs_of, memory_told


def choose_samples(splits: Sequence[TaskData], count: int, seed: int) -> Row:
    """`count` samples as (task, sample), each at most once, of each task in proportion to its size; all, where there are no more.

    Those without supervised tokens are left out. Of a larger count, the first are those of a smaller one.
    """
    chosen: list[tuple[float, tuple[int, int]]] = []
    for task, split in enumerate(splits):
        able = np.flatnonzero(split.supervised > 0)
        shuffled = np.random.default_rng((seed, task)).permutation(able)
        chosen += [((rank + 0.5) / len(able), (task, sample)) for rank, sample in enumerate(shuffled.tolist())]
    return [sample for _, sample in sorted(chosen)[:count]]


@torch.no_grad()
def sample_losses(model: nn.Module, data: EvaluationData, samples: Row, config: Config, rows_per_batch: int) -> NDArray[np.float64]:
    """Mean token loss of each of `samples` in nats, [samples]; not finite where the model's is not.

    The samples are packed as in training and do not see each other. Every sample's losses are summed by the objective as those of a
    task are.

    Args:
        model: as `loading.load` returns it.
        samples: (task, sample) of `data`, each once, with supervised tokens.
        config: its `data` section says how rows are packed.
        rows_per_batch: rows of one forward pass.

    Raises:
        UserError: the model's output layer is not one that is known here; a GPU has too little memory.
    """
    objective, device = checked_objective(model, data, len(samples))
    numbers = {sample: number for number, sample in enumerate(samples)}
    sums = torch.zeros(len(samples), dtype=torch.float64, device=device)
    for rows, batch in batches(_rows(data, samples, config), data, config, rows_per_batch, "samples"):
        inputs = inputs_of(batch, device)
        places = _numbered(rows, batch.input_ids.shape, data.splits, numbers).to(device)
        with memory_told(batch):
            hidden, labels, _, weights = objective.supervised(*inputs)
            sums += objective.output_loss(hidden, labels, places[inputs[2] >= 0], weights, None)[1]
    tokens = np.array([int(data.splits[task].supervised[sample]) for task, sample in samples])
    return sums.cpu().numpy() / tokens


def _rows(data: EvaluationData, samples: Row, config: Config) -> list[Row]:
    """The samples as rows."""
    of_tasks = [np.array([sample for owner, sample in samples if owner == task], np.int64) for task in range(len(data.splits))]
    lengths = [split.lengths[chosen] for split, chosen in zip(data.splits, of_tasks, strict=True)]
    rows = validation_rows(lengths, config.data.sequence_length, config.data.packing)
    return [[(task, int(of_tasks[task][place])) for task, place in row] for row in rows]


def _numbered(rows: Sequence[Row], shape: Sequence[int], splits: Sequence[TaskData], numbers: dict[tuple[int, int], int]) -> torch.Tensor:
    """int64 [rows, length]: the number of the sample that a token is of; -1 on padding."""
    places = np.full(tuple(shape), -1, np.int64)
    for index, row in enumerate(rows):
        lengths = [int(splits[task].lengths[sample]) for task, sample in row]
        places[index, : sum(lengths)] = np.repeat([numbers[sample] for sample in row], lengths)
    return torch.from_numpy(places)
