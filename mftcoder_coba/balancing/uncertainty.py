"""`uncertainty`: uncertainty weighting, arXiv 1705.07115 (Eq. 10, with the log-variance s_k = log sigma_k^2 of section 3.2).

    minimised over s    sum_k (exp(-s_k) l_k + s_k) / 2,   gradient  (1 - exp(-s_k) l_k) / 2,   s_k = 0 at the start
    weight              w_k = exp(-s_k) / sum_j exp(-s_j)

At rest exp(-s_k) = 1 / l_k: a task with a large loss gets less. l_k is the task's train loss before the optimizer moved.

Where the paper leaves a choice: s is learned by Adam with a rate of its own, `learning_rate`, which bounds its move in a step
whatever the size of the losses; and the weights are scaled to the sum 1, which leaves the model's step size to its own rate.
An absent task keeps its s and what Adam knows of it.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.adam import adam_state, adam_step
from mftcoder_coba.balancing.base import LARGEST_LOSS, Signals, Stateful, measured, normalised, softmax
from mftcoder_coba.config import UncertaintyConfig


class Uncertainty(Stateful):
    kind = "uncertainty"
    signals = frozenset({"train_losses"})

    def __init__(self, config: UncertaintyConfig, tasks: tuple[str, ...]):
        super().__init__(tasks, log_variance=np.zeros(len(tasks)), **adam_state(len(tasks)))
        self._config = config

    def _learn(self, signals: Signals) -> None:
        losses, variances = measured(signals.train_losses, len(self.tasks)), self.state["log_variance"]
        with np.errstate(divide="ignore"):
            # exp(-s) l as one power: with l = 0 it is 0 however low s has gone.
            scaled = np.exp(np.minimum(np.log(losses) - variances, np.log(LARGEST_LOSS)))
        gradient = 0.5 * (1.0 - scaled)
        self.state["log_variance"] = adam_step(variances, gradient, self.state, self._config.learning_rate)

    def _weigh(self) -> np.ndarray:
        return normalised(softmax(-self.state["log_variance"]))

    def _shown(self) -> dict[str, np.ndarray]:
        return {"log_variance": self.state["log_variance"]}
