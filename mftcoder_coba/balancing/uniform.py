"""`uniform`: w_k = 1 / K."""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import SignalFree
from mftcoder_coba.config import UniformConfig


class Uniform(SignalFree):
    def __init__(self, config: UniformConfig, tasks: tuple[str, ...]):
        super().__init__(tasks)
        self.last = np.full(len(tasks), 1.0 / len(tasks))

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        return self.last.copy()
