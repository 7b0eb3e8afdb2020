"""The contract of a balancer, and the few things that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Signals:
    """What was measured after one optimizer step. A balancer's `signals` are names of fields here.

    Attributes:
        step: the optimizer step (1-based) after which it was measured.
        validation_losses: [K] mean loss of each task on one validation mini-batch; NaN where it is missing.
        slots: [K] which mini-batch of its cycle each task's loss is from: small numbers, 0, 1, ...; a task's equal numbers
            stand for the same samples. Comes with `validation_losses`.
    """

    step: int
    validation_losses: np.ndarray | None = None
    slots: np.ndarray | None = None


class Balancer(Protocol):
    """A method that chooses task weights. It is built from (resolved config, task names)."""

    tasks: tuple[str, ...]
    signals: frozenset[str]

    def start(self, initial: np.ndarray) -> None:
        """Called once before the first step of a new run (not of a resumed one) with `initial` [K] float64: each task's
        mean loss on its full validation set. A method that divides by them raises UserError if one cannot be used."""

    def wants(self, step: int) -> bool:
        """Whether `observe` must be called after optimizer step `step` (1-based)."""

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        """[K] float64 with the sum 1 for the next step. `denominators` [K] are that step's N_k: supervised tokens, or
        samples, of each task in the global batch. The array is the caller's own."""

    def observe(self, signals: Signals) -> None:
        """Takes the measurements of one wanted step. Steps must increase."""

    def record(self) -> dict[str, Any]:
        """What there is to show, as JSON values: {"tasks": {NAME: {"weight": the next step's, ...}}, ...}; null where
        nothing is defined yet."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` restores the balancer bit for bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. Raises UserError where it is of other tasks."""


class SignalFree:
    """What the methods have in common that measure nothing: no observation, no state. A child defines `weights` and keeps
    what it gave last in `last`."""

    signals: frozenset[str] = frozenset()

    def __init__(self, tasks: tuple[str, ...]):
        self.tasks = tasks
        self.last: np.ndarray | None = None  # [K]

    def start(self, initial: np.ndarray) -> None:
        pass

    def wants(self, step: int) -> bool:
        return False

    def observe(self, signals: Signals) -> None:
        raise ValueError(f"{type(self).__name__} takes no observations")

    def record(self) -> dict[str, Any]:
        values = [None] * len(self.tasks) if self.last is None else plain(self.last)
        return {"tasks": {name: {"weight": value} for name, value in zip(self.tasks, values, strict=True)}}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class History:
    """Values in the order of their arrival: the last `limit` of them, or all.

    They lie in that order in one block of memory, whatever came before them, so a sum over them has the same bits before
    and after a restart. (A ring buffer would sum from another starting point.)
    """

    def __init__(self, shape: tuple[int, ...] = (), limit: int | None = None, dtype: type = np.float64):
        self._block = np.empty((16, *shape), dtype)
        self._limit = limit
        self._start = self._end = 0

    @property
    def values(self) -> np.ndarray:
        """[n, *shape], a view that the next `append` may invalidate."""
        return self._block[self._start : self._end]

    def append(self, value: Any) -> None:
        if self._end == len(self._block):
            self._make_room()
        self._block[self._end] = value
        self._end += 1
        if self._limit is not None and self._end - self._start > self._limit:
            self._start += 1

    def load(self, values: list[Any]) -> None:
        """Replaces the content by what `plain` made of the values of another history."""
        self._start = self._end = 0
        for value in values:
            self.append(np.array(value, self._block.dtype))  # None becomes NaN

    def _make_room(self) -> None:
        # Twice what is kept: a value is moved once on average, however long the run.
        kept = self.values
        block = np.empty((max(16, 2 * len(kept)), *kept.shape[1:]), kept.dtype)
        block[: len(kept)] = kept
        self._block, self._start, self._end = block, 0, len(kept)


def softmax(values: np.ndarray) -> np.ndarray:
    """exp(values) / sum(exp(values)), for finite values of any size. [n] -> [n]"""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def plain(values: np.ndarray) -> list[Any]:
    """An array as (nested) lists of Python numbers, with None for NaN. `json` writes and reads those without loss."""
    if values.dtype.kind == "i":
        return values.tolist()
    items = values.astype(object)
    items[np.isnan(values)] = None
    return items.tolist()
