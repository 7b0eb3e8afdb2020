"""`dwa`: dynamic weight average, arXiv 1803.10704 (Eq. 7).

    w_k = softmax over tasks of  r_k / T,   r_k = mean of the last n losses of task k / mean of the n losses before those

A task that came down less gets more. The paper compares epochs: each is one loss per task there, so its formula is this one
with n = 1 and an epoch for a step. Here the windows are the last losses of the task at every step, n = `window`.

r_k is 1, no change, for a task that has not been seen 2 n times, so the weights are 1 / K until one has; and for one whose
earlier mean is 0. An absent task keeps its windows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mftcoder_coba.balancing.base import LARGEST_LOSS, Signals, Stateful, measured, normalised, softmax
from mftcoder_coba.config import DwaConfig


class Dwa(Stateful):
    kind = "dwa"
    signals = frozenset({"train_losses"})

    def __init__(self, config: DwaConfig, tasks: tuple[str, ...]):
        super().__init__(tasks, losses=np.full((2 * config.window, len(tasks)), np.nan))  # [2 n, K], the newest at the end
        self._config = config

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The window is the config's: a longer one fills up, a shorter one forgets at once."""
        rows = 2 * self._config.window
        super().load_state_dict(state)
        saved = self.state["losses"][-rows:]
        self.state["losses"] = np.concatenate([np.full((rows - len(saved), len(self.tasks)), np.nan), saved])

    def _learn(self, signals: Signals) -> None:
        new = measured(signals.train_losses, len(self.tasks))
        losses = self.state["losses"]
        self.state["losses"] = np.where(np.isnan(new), losses, np.concatenate([losses[1:], new[None]]))

    def _weigh(self) -> np.ndarray:
        ratio = self._ratios()
        with np.errstate(over="ignore"):
            arguments = np.minimum(np.where(np.isnan(ratio), 1.0, ratio) / self._config.temperature, LARGEST_LOSS)
        return normalised(softmax(arguments))

    def _ratios(self) -> np.ndarray:
        """[K]; NaN where it is not defined."""
        earlier, later = self.state["losses"].reshape(2, self._config.window, -1).sum(axis=1)  # NaN until both are full
        with np.errstate(over="ignore"):
            ratio = np.divide(later, earlier, out=np.full(len(later), np.nan), where=earlier > 0)
        return np.minimum(ratio, LARGEST_LOSS)

    def _shown(self) -> dict[str, np.ndarray]:
        return {"ratio": self._ratios()}
