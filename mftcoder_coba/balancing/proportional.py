"""`proportional`: w_k = N_k / sum_j N_j. The loss is then the mean over all tokens (or samples): ordinary fine-tuning."""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import SignalFree
from mftcoder_coba.config import ProportionalConfig


class Proportional(SignalFree):
    def __init__(self, config: ProportionalConfig, tasks: tuple[str, ...]):
        super().__init__(tasks)

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        counts = np.asarray(denominators, np.float64)
        # A batch without any supervised token has no proportions; its loss is 0 with any weights.
        self.last = counts / counts.sum() if counts.any() else np.full(len(self.tasks), 1.0 / len(self.tasks))
        return self.last.copy()
