"""What CoBa keeps of past observations."""

from __future__ import annotations

from typing import Any

import numpy as np


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
