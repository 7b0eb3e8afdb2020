"""`random`: random loss weighting, arXiv 2111.10603 (Algorithm 2).

    w = softmax(g),  g_k independent standard normal numbers, new ones for every step

The numbers of a step follow from the seed and the number of the step alone, so a resumed run draws what the unbroken run
would have drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mftcoder_coba.balancing.base import SignalFree, check_state, normalised, softmax
from mftcoder_coba.config import RandomConfig


class Random(SignalFree):
    """Counts the calls of `weights`: one for each optimizer step."""

    def __init__(self, config: RandomConfig, tasks: tuple[str, ...]):
        super().__init__(tasks)
        self._seed = config.seed
        self._step = 0  # weights were given for so many

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        self._step += 1
        self.last = self._drawn()
        return self.last.copy()

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "random", "tasks": list(self.tasks), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "random", self.tasks)
        self._step = state["step"]
        self.last = self._drawn() if self._step else None

    def _drawn(self) -> np.ndarray:
        return normalised(softmax(np.random.default_rng((self._seed, self._step)).standard_normal(len(self.tasks))))
