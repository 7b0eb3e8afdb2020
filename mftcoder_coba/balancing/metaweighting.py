"""`metaweighting`: Mao et al., MetaWeighting: Learning to Weight Tasks in Multi-Task Learning (Findings of ACL 2022).

The weights are parameters too, and learn from what a step of the network does to the validation losses V = sum_i v_i:

    weight    w = softmax(xi),  xi = 0 at the start
    step      theta' = theta - eta sum_k w_k grad l_k(theta)
    product   p_k = <grad V(theta'), grad l_k(theta)>,   so  dV(theta') / dw_k = -eta p_k
    update    xi is moved by Adam along  dV / dxi_k = -eta w_k (p_k - sum_j w_j p_j):  the softmax Jacobian applied to -eta p

A task whose gradient points where the validation losses fall gains.

Where we choose:
- The gradients are those of the output layer (`gradients` "output_layer"), or of all trained parameters ("all": exact, with a
  backward pass for each task).
- The step is taken as plain gradient descent, although the network's optimizer may be another.
- eta is left out. Adam divides a gradient by its own size, so a constant factor of all gradients does nothing; nor does a
  learning rate that falls over the run then make the products of late steps count for less.
- Products of gradients can be far below Adam's usual epsilon, 1e-8, which would stop xi. Here epsilon is 1e-150: below all
  that is measured, and above what has no square in float64. Equal products give a gradient of exactly 0.
- A task without a product keeps its xi and what Adam knows of it, and takes no part in the update of the others: their w is the
  softmax over the present tasks.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.adam import adam_state, adam_step
from mftcoder_coba.balancing.base import Signals, Stateful, measured, normalised, softmax, through_softmax
from mftcoder_coba.config import MetaWeightingConfig

EPSILON = 1e-150


class MetaWeighting(Stateful):
    kind = "metaweighting"
    choice = "gradients"
    SIGNALS = {"output_layer": frozenset({"output_gradient_products"}), "all": frozenset({"full_gradient_products"})}

    def __init__(self, config: MetaWeightingConfig, tasks: tuple[str, ...]):
        super().__init__(tasks, logit=np.zeros(len(tasks)), product=np.full(len(tasks), np.nan), **adam_state(len(tasks)))
        self.signals = self.SIGNALS[config.gradients]
        self._config = config

    def _learn(self, signals: Signals) -> None:
        given = signals.full_gradient_products if self._config.gradients == "all" else signals.output_gradient_products
        products = measured(given, len(self.tasks), signed=True)
        gradient = through_softmax(self.state["logit"], -products)
        self.state["logit"] = adam_step(self.state["logit"], gradient, self.state, self._config.learning_rate, epsilon=EPSILON)
        self.state["product"] = np.where(np.isnan(products), self.state["product"], products)

    def _weigh(self) -> np.ndarray:
        return normalised(softmax(self.state["logit"]))

    def _shown(self) -> dict[str, np.ndarray]:
        return {"logit": self.state["logit"], "product": self.state["product"]}
