"""What the first epoch of a run is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mftcoder_coba.config import Config
from mftcoder_coba.data import Corpus, TrainSchedule, padded_length


@dataclass(frozen=True)
class TaskMixture:
    """A task's part of the first epoch.

    Attributes:
        passes: how often each of its samples is seen.
        token_share: its part of all tokens; supervised_share: of all supervised ones.
        documents_per_step: in a global batch, on average; fewest and most: over the epoch's full steps (all, if there is no full one).
        steps_without: full steps in whose global batch it is absent.
    """

    documents: int
    passes: float
    tokens: int
    token_share: float
    supervised_tokens: int
    supervised_share: float
    documents_per_step: float
    fewest: int
    most: int
    steps_without: int


@dataclass(frozen=True)
class Mixture:
    """The first epoch as rows and steps.

    Attributes:
        fill: tokens over places: a micro-batch is as wide as its longest row, the rest is padding.
        steps_per_epoch: the last one may be short.
    """

    documents: int
    tokens: int
    rows: int
    fill: float
    global_batch_rows: int
    steps_per_epoch: float
    tasks: dict[str, TaskMixture]


def accounting(config: Config, corpus: Corpus, schedule: TrainSchedule) -> dict[str, Any]:
    """What becomes of every sample and what the first epoch is made of, as plain values: the file `accounting.json`."""
    tasks = {task: {split: part.to_dict() for split, part in splits.items()} for task, splits in corpus.accounting.items()}
    return {"tasks": tasks, "mixture": asdict(mixture(config, corpus, schedule))}


def mixture(config: Config, corpus: Corpus, schedule: TrainSchedule) -> Mixture:
    """What the first epoch is made of, counted in its own order."""
    train, epoch, batch_rows = corpus.splits["train"], schedule.epoch(0), config.training.global_batch_rows
    row = np.repeat(np.arange(len(epoch), dtype=np.int32), np.diff(epoch.starts))
    full_steps = max(1, len(epoch) // batch_rows)
    lengths, supervised = np.zeros(len(row), np.int32), np.zeros(len(row), np.int32)
    for number, task in enumerate(train):
        of_task = epoch.tasks == number
        lengths[of_task], supervised[of_task] = task.lengths[epoch.samples[of_task]], task.supervised[epoch.samples[of_task]]
    tasks = {}
    for number, name in enumerate(corpus.tasks):
        of_task = epoch.tasks == number
        per_step = np.bincount(row[of_task] // batch_rows, minlength=full_steps)[:full_steps]
        tasks[name] = TaskMixture(
            documents=int(of_task.sum()),
            passes=schedule.passes_per_epoch[number],
            tokens=int(lengths[of_task].sum()),
            token_share=float(lengths[of_task].sum() / lengths.sum()),
            supervised_tokens=int(supervised[of_task].sum()),
            supervised_share=float(supervised[of_task].sum() / supervised.sum()),
            documents_per_step=float(per_step.mean()),
            fewest=int(per_step.min()),
            most=int(per_step.max()),
            steps_without=int((per_step == 0).sum()),
        )
    return Mixture(
        documents=len(row),
        tokens=int(lengths.sum()),
        rows=len(epoch),
        fill=float(lengths.sum() / _places(np.bincount(row, lengths).astype(np.int64), config)),
        global_batch_rows=batch_rows,
        steps_per_epoch=len(epoch) / batch_rows,
        tasks=tasks,
    )


def _places(row_lengths: np.ndarray, config: Config) -> int:
    """Tokens and padding of all micro-batches."""
    rows = config.training.micro_batch_rows
    firsts = np.arange(0, len(row_lengths), rows)
    longest = np.maximum.reduceat(row_lengths, firsts)
    widths = [padded_length(int(length), config.data.sequence_length) for length in longest]
    return int(np.dot(widths, np.minimum(rows, len(row_lengths) - firsts)))
