"""Which samples, in which order. Everything here is a function of the seed and of one number.

Training: the number of the row in an endless sequence that all ranks share. Validation for the balancer: the number of
the observation.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from mftcoder_coba.data.packing import PACKERS

Row = list[tuple[int, int]]  # (task, sample) of each document, in order

_TRAINING, _BALANCER = 0, 1  # random streams that never meet


@dataclass(frozen=True)
class Epoch:
    """One epoch's rows. Row j holds the documents starts[j] .. starts[j + 1]."""

    tasks: np.ndarray  # int32 [documents]
    samples: np.ndarray  # int32 [documents]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Row:
        part = slice(self.starts[number], self.starts[number + 1])
        return list(zip(self.tasks[part].tolist(), self.samples[part].tolist(), strict=True))


def shares_of(tasks: list[float | str | None], sizes: list[int], temperature: float) -> list[float] | None:
    """The shares in the config -> a number for each task, in any unit; None: proportional to size.

    Args:
        tasks: `share` of each task, of one kind for all: None, numbers, or "temperature".
        sizes: samples of each task.
        temperature: T of size ^ (1 / T).
    """
    if tasks[0] is None:
        return None
    return [size ** (1 / temperature) if share == "temperature" else float(share) for share, size in zip(tasks, sizes, strict=True)]


class TrainSchedule:
    """The endless sequence of training rows.

    An epoch has as many samples as all tasks together. Without shares, that is each sample once. With shares, task k
    gets its share of them and walks through its own shuffled passes, from epoch to epoch without a break. In an epoch,
    sample i of the n of a task stands at (i + its task's offset) / n of the way, so tasks are spread evenly; then the
    epoch is packed.

    Any epoch is computed from its number alone; only the last ones asked for are kept.
    """

    def __init__(self, lengths: list[np.ndarray], shares: list[float] | None, seed: int, sequence_length: int, packing: str):
        """Args:
        lengths: per task, tokens of each of its samples.
        shares: per task, its part of the sampled data in any unit; None: proportional to size.
        packing: a key of `PACKERS`.

        Raises:
            ValueError: a task without samples.
        """
        if not lengths or min(map(len, lengths)) == 0:
            raise ValueError("every task needs at least one sample")
        self._lengths, self._seed, self._sequence_length, self._packer = lengths, seed, sequence_length, PACKERS[packing]
        sizes = [len(task) for task in lengths]
        self.samples_per_epoch = sizes if shares is None else _apportion(sum(sizes), shares)
        self._first_rows = [0]  # of epoch 0, 1, ... as far as known
        self._kept: dict[int, Epoch] = {}

    @property
    def passes_per_epoch(self) -> list[float]:
        """How often each task's data is seen in one epoch."""
        return [count / len(task) for count, task in zip(self.samples_per_epoch, self._lengths, strict=True)]

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows start..stop-1 of the endless sequence."""
        result = []
        while start < stop:
            number = self._epoch_at(start)
            first, epoch = self._first_rows[number], self.epoch(number)
            end = min(stop, first + len(epoch))
            result += [epoch.row(row - first) for row in range(start, end)]
            start = end
        return result

    def epoch(self, number: int) -> Epoch:
        """Epoch 0, 1, ..."""
        if number not in self._kept:
            while len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            self._kept[number] = self._compute(number)
        return self._kept[number]

    def rows_in_epoch(self, epoch: int) -> int:
        self._know(epoch)
        return self._first_rows[epoch + 1] - self._first_rows[epoch]

    def rows_until(self, epochs: float) -> int:
        """Rows of so many epochs, rounded up to a whole row."""
        whole = math.floor(epochs)
        self._know(whole - 1)
        part = math.ceil((epochs - whole) * self.rows_in_epoch(whole)) if epochs > whole else 0
        return self._first_rows[whole] + part

    def epoch_of(self, row: int) -> float:
        """How many epochs are done when `row` rows are: the epoch's number and the part of it."""
        epoch = self._epoch_at(row)
        return epoch + (row - self._first_rows[epoch]) / self.rows_in_epoch(epoch)

    def _epoch_at(self, row: int) -> int:
        while self._first_rows[-1] <= row:
            self._know(len(self._first_rows) - 1)
        return bisect_right(self._first_rows, row) - 1

    def _know(self, epoch: int) -> None:
        """How many rows an epoch has shows only when it is packed."""
        while len(self._first_rows) < epoch + 2:
            self._first_rows.append(self._first_rows[-1] + len(self.epoch(len(self._first_rows) - 1)))

    def _compute(self, epoch: int) -> Epoch:
        counts = self.samples_per_epoch
        samples = np.concatenate([self._draws(task, epoch) for task in range(len(counts))])
        tasks = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        way = np.concatenate([(np.arange(count) + (task + 0.5) / len(counts)) / count for task, count in enumerate(counts)])
        even = np.argsort(way, kind="stable")
        del way
        tasks, samples = tasks[even], samples[even]
        del even
        lengths = np.zeros(len(tasks), np.int32)
        for task, of_task in enumerate(self._lengths):
            lengths[tasks == task] = of_task[samples[tasks == task]]
        order, starts = self._packer(lengths, self._sequence_length)
        return Epoch(tasks[order], samples[order], starts)

    def _draws(self, task: int, epoch: int) -> np.ndarray:
        """The task's samples of one epoch, int32 [samples_per_epoch]: a piece of its endless walk through shuffled passes."""
        size, count = len(self._lengths[task]), self.samples_per_epoch[task]
        first = epoch * count
        passes = range(first // size, (first + count - 1) // size + 1)
        walk = np.concatenate([_shuffled(size, self._seed, _TRAINING, task, number) for number in passes])
        return walk[first - passes.start * size :][:count]


class BalancerStream:
    """Validation mini-batches for the balancer: every one holds every task.

    Each task's samples, in a seeded order, are cut into slots of about equal size and of fixed content. Observation n
    takes slot n mod M_k of each task k, so a slot returns every M_k observations.

    Attributes:
        slots_per_task: M_k.
        coverage: M, the largest M_k: so many observations cover the whole validation set.
    """

    # Whole documents do not fill rows to the last token. Slots that sum to less than the rows hold need no extra row;
    # the fullest of these is taken with which (nearly) all mini-batches keep to `rows`.
    FILLS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
    KEPT, TRIED = 0.95, 100

    def __init__(self, lengths: list[np.ndarray], seed: int, sequence_length: int, packing: str, rows: int):
        """Args:
        lengths: per task, tokens of each of its validation samples.
        rows: of a mini-batch, over all ranks. Some mini-batches may need more: no slot is without a sample, and
            documents are never cut.

        Raises:
            ValueError: a task without samples.
        """
        if not lengths or min(map(len, lengths)) == 0:
            raise ValueError("every task needs at least one validation sample")
        self._lengths, self._sequence_length, self._packing = lengths, sequence_length, packing
        orders = [_shuffled(len(of_task), seed, _BALANCER, task, 0) for task, of_task in enumerate(lengths)]
        if packing == "none":
            self._set_slots([_cut(order, np.ones(len(order)), max(1, rows // len(lengths))) for order in orders])
            return
        for fill in (*self.FILLS, self.FILLS[0]):  # where one sample of each task is too much already, nothing is gained by small slots
            tokens = fill * rows * sequence_length / len(lengths)
            self._set_slots([_cut(order, of_task[order], tokens) for order, of_task in zip(orders, lengths, strict=True)])
            tried = min(self.coverage, self.TRIED)
            if sum(len(self.mini_batch(observation)[0]) <= rows for observation in range(tried)) >= self.KEPT * tried:
                break

    def _set_slots(self, slots: list[list[np.ndarray]]) -> None:
        self._slots = slots
        self.slots_per_task = tuple(map(len, slots))
        self.coverage = max(self.slots_per_task)

    def mini_batch(self, observation: int) -> tuple[list[Row], np.ndarray]:
        """Observation 0, 1, 2, ... -> (its rows, the slot of each task int64 [tasks])."""
        slots = np.array([observation % count for count in self.slots_per_task], np.int64)
        documents = [(task, sample) for task, slot in enumerate(slots.tolist()) for sample in self._slots[task][slot].tolist()]
        rows = _longest_first(documents, self._lengths, self._sequence_length, self._packing)
        return _evened_out(rows, self._lengths, self._sequence_length), slots


def validation_rows(lengths: list[np.ndarray], sequence_length: int, packing: str) -> list[Row]:
    """All samples of all tasks, each once. Tasks without samples are allowed."""
    documents = [(task, sample) for task, of_task in enumerate(lengths) for sample in range(len(of_task))]
    return _longest_first(documents, lengths, sequence_length, packing)


def _longest_first(documents: Row, lengths: list[np.ndarray], sequence_length: int, packing: str) -> list[Row]:
    """Order is free here: the longest first packs best, and unpacked rows beside each other are of one length."""
    documents = sorted(documents, key=lambda document: (-lengths[document[0]][document[1]], document))
    sizes = [int(lengths[task][sample]) for task, sample in documents]
    order, starts = PACKERS[packing](sizes, sequence_length, max(1, len(sizes)))
    return [[documents[index] for index in order[start:stop]] for start, stop in zip(starts[:-1], starts[1:], strict=True)]


def _evened_out(rows: list[Row], lengths: list[np.ndarray], sequence_length: int) -> list[Row]:
    """The same documents in as many rows of nearly equal length: short rows beside a long one are padding, and ranks wait for
    the slowest. Each document, the longest first, goes to the shortest row; where that does not fit, rows stay as they were."""
    even: list[Row] = [[] for _ in rows]
    filled = [0] * len(rows)
    for task, sample in sorted((document for row in rows for document in row), key=lambda document: (-lengths[document[0]][document[1]], document)):
        shortest = filled.index(min(filled))
        even[shortest].append((task, sample))
        filled[shortest] += int(lengths[task][sample])
    return even if max(filled, default=0) <= sequence_length else rows


def _shuffled(size: int, *stream: int) -> np.ndarray:
    """int32 [size]: the permutation of a random stream named by numbers."""
    return np.random.default_rng(stream).permutation(size).astype(np.int32)


def _apportion(total: int, shares: list[float]) -> list[int]:
    """`total` in whole parts by share, largest remainders first; every task gets at least one."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: total - sum(counts)]:
        counts[task] += 1
    return [max(1, count) for count in counts]


def _cut(order: np.ndarray, sizes: np.ndarray, quota: float) -> list[np.ndarray]:
    """`order` in consecutive pieces of about equal size, at most about `quota`, none empty."""
    ends = np.cumsum(sizes, dtype=np.float64)
    pieces = math.ceil(ends[-1] / quota)
    middle = ends - np.asarray(sizes) / 2
    piece = np.floor(middle / ends[-1] * pieces)
    return np.split(order, np.flatnonzero(np.diff(piece)) + 1)
