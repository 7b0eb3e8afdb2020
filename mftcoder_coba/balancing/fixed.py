"""`fixed`: w_k = g_k / sum_j g_j, with the numbers g that the config gives."""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import SignalFree, normalised
from mftcoder_coba.config import FixedConfig


class Fixed(SignalFree):
    def __init__(self, config: FixedConfig, tasks: tuple[str, ...]):
        super().__init__(tasks)
        given = np.array([config.weights[name] for name in tasks], np.float64)
        self.last = normalised(given)

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        return self.last.copy()
