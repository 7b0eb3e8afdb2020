"""`lbtw`: loss-balanced task weighting (Liu, Liang, Gitter, AAAI 2019).

    w_k = r_k^b / sum_j r_j^b,   r_k = l_k(t) / l_k(0)

A task that has come down further gets less. With `signal` "train", l_k(t) is the loss of the newest batch and l_k(0) that of
the first one in which the task had a positive loss; with "validation" (the CoBa paper's LBTW*), l_k(t) is the loss of a
validation mini-batch and l_k(0) the full validation loss before training.

An absent task keeps its last ratio; a task that was never seen has the ratio 1.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import Signals, Stateful, divisors, loss_ratios, measured, normalised
from mftcoder_coba.config import LbtwConfig


class Lbtw(Stateful):
    kind = "lbtw"
    choice = "signal"
    SIGNALS = {"train": frozenset({"train_losses"}), "validation": frozenset({"validation_losses"})}

    def __init__(self, config: LbtwConfig, tasks: tuple[str, ...]):
        super().__init__(tasks, initial=np.full(len(tasks), np.nan), ratio=np.full(len(tasks), np.nan))
        self.signals = self.SIGNALS[config.signal]
        self._config = config

    def start(self, initial: np.ndarray) -> None:
        """With `signal` "validation", raises UserError for a task whose loss before training is not a positive number."""
        if self._config.signal == "validation":
            self.state["initial"] = divisors(initial, self.tasks, self.kind)

    def _learn(self, signals: Signals) -> None:
        if self._config.signal == "validation":
            losses, initial = measured(signals.validation_losses, len(self.tasks)), self.state["initial"]
            if np.isnan(initial).any():
                raise ValueError("observe came before start")
        else:
            losses, initial = measured(signals.train_losses, len(self.tasks)), self.state["initial"]
            initial = self.state["initial"] = np.where(np.isnan(initial) & (losses > 0), losses, initial)
        ratio = loss_ratios(losses, initial)
        self.state["ratio"] = np.where(np.isnan(ratio), self.state["ratio"], ratio)

    def _weigh(self) -> np.ndarray:
        ratio = np.where(np.isnan(self.state["ratio"]), 1.0, self.state["ratio"])
        if not ratio.any():
            return np.full(len(ratio), 1.0 / len(ratio))  # all losses are 0: there is nothing left to weigh
        return normalised((ratio / ratio.max()) ** self._config.exponent)

    def _shown(self) -> dict[str, np.ndarray]:
        return {"ratio": self.state["ratio"]}
