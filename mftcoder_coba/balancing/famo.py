"""`famo`: fast adaptive multitask optimization, arXiv 2306.03792 (Algorithm 1).

    z = softmax(xi),  xi = 0 at the start
    weight   w_k = c z_k / l_k,   c = 1 / sum_j (z_j / l_j):  the gradient of  c sum_k z_k log l_k,  with c held fixed
    update   d_k = log l_k before - log l_k after the step, on one batch
             xi is moved by Adam along  g_k = z_k (d_k - sum_j z_j d_j) + decay xi_k:  the softmax Jacobian applied to d

All tasks are to go down at the same rate, so one that went down less than the others gains. The logarithms are of l + 1e-8,
as in the authors' code.

The weights are needed before the step's own losses are known. The l_k in w_k is the newest loss at the parameters of the
step that costs no further forward pass: the one after the step before, on its batch; before the first step, the
validation loss before training. A task without any loss yet counts with the mean of the others'.

`signal` "validation" (the CoBa paper's FAMO*) has w_k = z_k, the weights of plain losses, and takes d_k from one validation
mini-batch before and after the step.

A task that is absent before or after keeps its xi and what Adam knows of it, and takes no part in the update of the
others: their z is the softmax over the present tasks.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.adam import adam_state, adam_step
from mftcoder_coba.balancing.base import Signals, Stateful, measured, normalised, softmax, through_softmax
from mftcoder_coba.config import FamoConfig

EPSILON = 1e-8


class Famo(Stateful):
    kind = "famo"
    choice = "signal"
    SIGNALS = {
        "train": frozenset({"train_losses", "train_losses_after"}),
        "validation": frozenset({"validation_losses_before", "validation_losses"}),
    }

    def __init__(self, config: FamoConfig, tasks: tuple[str, ...]):
        super().__init__(tasks, logit=np.zeros(len(tasks)), loss=np.full(len(tasks), np.nan), **adam_state(len(tasks)))
        self.signals = self.SIGNALS[config.signal]
        self._config = config

    def start(self, initial: np.ndarray) -> None:
        self.state["loss"] = measured(initial, len(self.tasks))

    def _learn(self, signals: Signals) -> None:
        if self._config.signal == "validation":
            pair = signals.validation_losses_before, signals.validation_losses
        else:
            pair = signals.train_losses, signals.train_losses_after
        before, after = (measured(losses, len(self.tasks)) for losses in pair)
        progress = np.log(before + EPSILON) - np.log(after + EPSILON)
        gradient = through_softmax(self.state["logit"], progress)
        self.state["logit"] = adam_step(self.state["logit"], gradient, self.state, self._config.learning_rate, self._config.decay)
        self.state["loss"] = np.where(np.isnan(after), self.state["loss"], after)

    def _weigh(self) -> np.ndarray:
        z, losses = softmax(self.state["logit"]), self.state["loss"]
        known = ~np.isnan(losses)
        if self._config.signal == "validation" or not known.any():
            return normalised(z)
        return normalised(z / (np.where(known, losses, losses[known].mean()) + EPSILON))

    def _shown(self) -> dict[str, np.ndarray]:
        return {"logit": self.state["logit"], "loss": self.state["loss"]}
