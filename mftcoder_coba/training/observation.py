"""What a balancer wants to know of a step, measured around it.

before the step   its validation mini-batch; each task's gradient of all parameters; a copy of the output layer if it is trained
the step          its forward passes give the training losses, and the last hidden states for gradients at the output layer
after the step    the batch once more; the validation mini-batch, in one pass for losses and hidden states; gradients

Only what is declared is done. What is handed out comes from sums over ranks and is the same to the bit on all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mftcoder_coba.balancing import VALIDATION_SIGNALS, Signals
from mftcoder_coba.data import BalancerStream, Batch
from mftcoder_coba.engine import Engine
from mftcoder_coba.objective import OutputLayer, OutputTokens, TaskTokens, gradient_norms, gradient_products
from mftcoder_coba.training.gradients import gradients_of
from mftcoder_coba.training.step import StepOutcome, TaskLosses, losses_of
from mftcoder_coba.training.validation import Validation

TRAIN_OUTPUT = frozenset({"output_gradient_norms", "output_gradient_products"})
VALIDATION_OUTPUT = frozenset({"validation_output_gradient_norms", "output_gradient_products"})
VALIDATION_AFTER = VALIDATION_SIGNALS - {"validation_losses_before"}


class Observer:
    """Measures the signals that a balancer declares.

    Args:
        wanted: names of fields of `Signals`.
        stream: the validation mini-batches; needed for `VALIDATION_SIGNALS` only.
        update_interval: steps between two observations.
        seed_dropout: makes dropout draw what it draws in the current step.
    """

    def __init__(
        self,
        engine: Engine,
        wanted: frozenset[str],
        validation: Validation,
        stream: BalancerStream | None,
        update_interval: int,
        seed_dropout: Callable[[], None],
    ):
        self.engine, self.wanted, self.validation, self.stream = engine, wanted, validation, stream
        self.update_interval, self.seed_dropout = update_interval, seed_dropout

    def around(self, step: int, batches: Sequence[Batch], train: Callable[[], StepOutcome]) -> tuple[Signals, float]:
        """Calls `train`, which takes optimizer step `step` on this rank's `batches`.

        Returns:
            the signals, NaN where a task is absent or a number not finite; and the seconds that measuring took.
        """
        started = time.perf_counter()
        observation = _Observation(self, step, batches)
        observation.before()
        seconds = time.perf_counter() - started
        output_loss = self.engine.module.output_loss
        with output_loss.collecting() if self.wanted & TRAIN_OUTPUT else contextlib.nullcontext([]) as tokens:
            outcome = train()
        started = time.perf_counter()
        observation.after(outcome, tokens)
        signals = {name: values if name == "slots" else np.where(np.isfinite(values), values, np.nan) for name, values in observation.found.items()}
        return Signals(step, **signals), seconds + time.perf_counter() - started


class _Observation:
    """One step's measurements; `found` gathers fields of `Signals`."""

    def __init__(self, observer: Observer, step: int, batches: Sequence[Batch]):
        self.engine, self.wanted, self.validation = observer.engine, observer.wanted, observer.validation
        self.seed_dropout, self.batches = observer.seed_dropout, batches
        self.output_loss = observer.engine.module.output_loss
        self.found: dict[str, Any] = {}
        self.layer_before: OutputLayer | None = None
        self.gradients_before: torch.Tensor | None = None
        if self.wanted & VALIDATION_SIGNALS:
            self.rows, self.slots = observer.stream.mini_batch(step // observer.update_interval - 1)

    def before(self) -> None:
        if "validation_losses_before" in self.wanted:
            self.found["validation_losses_before"] = self.validation.losses(self.rows).losses
        if "full_gradient_products" in self.wanted:
            self.seed_dropout()
            # Of the sums S_k: the N_k of the step are not known yet.
            each = torch.eye(self.output_loss.num_tasks, dtype=torch.float64, device=self.engine.device)
            self.gradients_before = gradients_of(self.engine, self.batches, each)
        if self.wanted & TRAIN_OUTPUT and self.output_loss.trained:
            with self.engine.gathered(self.output_loss.external_parameters):
                self.layer_before = self.output_loss.layer(copy=True)

    def after(self, outcome: StepOutcome, tokens: list[OutputTokens]) -> None:
        self.found["train_losses"] = outcome.losses
        if "train_losses_after" in self.wanted:
            self.seed_dropout()  # the same masks as in the step
            self.found["train_losses_after"] = losses_of(self.engine, self.batches).losses
        validation, validation_tokens = None, []
        if self.wanted & VALIDATION_AFTER:
            with self.output_loss.collecting() if self.wanted & VALIDATION_OUTPUT else contextlib.nullcontext([]) as validation_tokens:
                validation = self.validation.losses(self.rows)
            self.found |= {"validation_losses": validation.losses, "slots": self.slots}
        if self.wanted & (TRAIN_OUTPUT | VALIDATION_OUTPUT):
            self.output_gradients(outcome, tokens, validation, validation_tokens)
        if "full_gradient_products" in self.wanted:
            self.found["full_gradient_products"] = self.full_products(outcome, validation)

    def output_gradients(
        self, outcome: StepOutcome, tokens: list[OutputTokens], validation: TaskLosses | None, validation_tokens: list[OutputTokens]
    ) -> None:
        ranks = self.engine.processes
        with torch.no_grad(), self.engine.gathered(self.output_loss.external_parameters):
            layer = self.output_loss.layer()
            if self.wanted & TRAIN_OUTPUT:
                train = TaskTokens.of(tokens, self.layer_before or layer, outcome.denominators)
            if self.wanted & VALIDATION_OUTPUT:
                valid = TaskTokens.of(validation_tokens, layer, validation.denominators)
            if "output_gradient_norms" in self.wanted:
                self.found["output_gradient_norms"] = gradient_norms(train, ranks)
            if "validation_output_gradient_norms" in self.wanted:
                self.found["validation_output_gradient_norms"] = gradient_norms(valid, ranks)
            if "output_gradient_products" in self.wanted:
                self.found["output_gradient_products"] = gradient_products(train, valid, ranks)

    def full_products(self, outcome: StepOutcome, validation: TaskLosses) -> np.ndarray:
        """[K] of the gradient of the sum of the validation losses now, with that of each training loss before the step."""
        means = np.divide(1.0, validation.denominators, out=np.zeros(len(validation.denominators)), where=validation.denominators > 0)
        with self.engine.evaluating():
            together = gradients_of(self.engine, self.validation.batches(self.rows), torch.from_numpy(means).to(self.engine.device)[None])
        products = (self.gradients_before * together).sum(1, dtype=torch.float64)
        products = self.engine.processes.all_reduce_sum(products).cpu().numpy()
        return np.divide(products, outcome.denominators, out=np.full(len(products), np.nan), where=outcome.denominators > 0)
