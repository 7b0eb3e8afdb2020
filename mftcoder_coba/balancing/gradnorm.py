"""`gradnorm`: gradient normalisation, arXiv 1711.02257 (Algorithm 1; Eq. 2 is the loss of the weights), at the output layer.

    factor   v_k > 0 with the sum K, 1 at the start; the weight is w_k = v_k / K
    norms    G_k = v_k n_k,   n_k = norm of the gradient of l_k at the output layer
    rate     r_k = (l_k / l_k(0)) / mean_j (l_j / l_j(0))
    target   T_k = mean_j (G_j) r_k^alpha, held constant
    update   v_k is moved by Adam along the gradient of sum_k |G_k - T_k|, which is sign(G_k - T_k) n_k, and v is scaled
             back to the sum K

A task whose loss has come down less than the others' is behind, r_k > 1, and its gradient is to be larger than the mean.

With `signal` "train", l_k and n_k are those of the newest batch and l_k(0) is the loss of the first batch in which the task had a
positive one; with "validation" (the CoBa paper's GradNorm*), they are those of a validation mini-batch and l_k(0) is the full
validation loss before training.

Where the paper leaves a choice:
- The layer is the output layer, weight and bias, which every task shares.
- Before v is scaled, a factor below 0.001, a thousandth of an equal weight, is set to that, so that all stay positive.
  Adam's steps do not shrink with v, so such a task can come back.
- A task is absent from a step if its loss or its norm was not measured, or if it has no l_k(0) yet. It keeps its v and all
  else; the means run over the present tasks, and these are scaled back to the sum that *they* had, so the sum stays K.
- All present losses 0: r_k = 1.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.adam import adam_state, adam_step
from mftcoder_coba.balancing.base import LARGEST_LOSS, Signals, Stateful, divisors, loss_ratios, measured, normalised
from mftcoder_coba.config import GradNormConfig

SMALLEST_FACTOR = 1e-3
# What a record shows of each task, of the newest step in which it was present.
SHOWN = ("ratio", "gradient_norm", "weighted_norm", "target_norm")  # l_k / l_k(0), n_k, G_k, T_k


class GradNorm(Stateful):
    kind = "gradnorm"
    choice = "signal"
    SIGNALS = {
        "train": frozenset({"train_losses", "output_gradient_norms"}),
        "validation": frozenset({"validation_losses", "validation_output_gradient_norms"}),
    }

    def __init__(self, config: GradNormConfig, tasks: tuple[str, ...]):
        count = len(tasks)
        unknown = {name: np.full(count, np.nan) for name in ("initial", *SHOWN)}
        super().__init__(tasks, factor=np.ones(count), **unknown, **adam_state(count))
        self.signals = self.SIGNALS[config.signal]
        self._config = config

    def start(self, initial: np.ndarray) -> None:
        """With `signal` "validation", raises UserError for a task whose loss before training is not a positive number."""
        if self._config.signal == "validation":
            self.state["initial"] = divisors(initial, self.tasks, self.kind)

    def _learn(self, signals: Signals) -> None:
        losses, norms = self._measured(signals)
        initial = self.state["initial"]
        initial = self.state["initial"] = np.where(np.isnan(initial) & (losses > 0), losses, initial)
        ratio = loss_ratios(losses, initial)
        there = ~np.isnan(ratio)
        if not there.any():
            return
        weighted = self.state["factor"] * norms
        target = weighted[there].mean() * self._pull(ratio, ratio[there].mean())
        for name, new in zip(SHOWN, (ratio, norms, weighted, target), strict=True):
            self.state[name] = np.where(there, new, self.state[name])
        self._move(np.where(there, np.sign(weighted - target) * norms, np.nan), there)

    def _measured(self, signals: Signals) -> tuple[np.ndarray, np.ndarray]:
        """Losses and norms [K]; both NaN where one is missing."""
        if self._config.signal == "train":
            pair = signals.train_losses, signals.output_gradient_norms
        elif np.isnan(self.state["initial"]).any():
            raise ValueError("observe came before start")
        else:
            pair = signals.validation_losses, signals.validation_output_gradient_norms
        losses, norms = (measured(values, len(self.tasks)) for values in pair)
        there = ~(np.isnan(losses) | np.isnan(norms))
        return np.where(there, losses, np.nan), np.where(there, norms, np.nan)

    def _pull(self, ratio: np.ndarray, mean: float) -> np.ndarray:
        """[K] r^alpha."""
        rate = ratio / mean if mean > 0 else np.ones(len(ratio))
        with np.errstate(over="ignore"):
            return np.minimum(rate**self._config.alpha, LARGEST_LOSS)

    def _move(self, gradient: np.ndarray, there: np.ndarray) -> None:
        """Adam's step of the factors, scaled back to the sum that the present tasks had."""
        factor = self.state["factor"]
        moved = np.clip(adam_step(factor, gradient, self.state, self._config.learning_rate), SMALLEST_FACTOR, LARGEST_LOSS)
        self.state["factor"] = np.where(there, moved * (factor[there].sum() / moved[there].sum()), factor)

    def _weigh(self) -> np.ndarray:
        return normalised(self.state["factor"])

    def _shown(self) -> dict[str, np.ndarray]:
        return {name: self.state[name] for name in SHOWN}
