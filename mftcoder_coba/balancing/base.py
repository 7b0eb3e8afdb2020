"""The contract of a balancer, and the few things that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mftcoder_coba.errors import UserError

# A larger loss is as good as infinite: its square could leave float64.
LARGEST_LOSS = 1e100
# What too small a weight is lifted to, so that every weight is positive.
SMALLEST_WEIGHT = 1e-300
# The fields of `Signals` that are measured on validation data.
VALIDATION_SIGNALS = frozenset(
    {
        "validation_losses",
        "validation_losses_before",
        "validation_output_gradient_norms",
        "output_gradient_products",
        "full_gradient_products",
    }
)


@dataclass(frozen=True)
class Signals:
    """What was measured after one optimizer step. A balancer's `signals` are names of fields here.

    All losses are [K] float64, means of each task; NaN where it is absent or not finite. Norms and
    products are NaN there too.

    Attributes:
        step: the optimizer step (1-based) after which it was measured.
        train_losses: S_k / N_k of the step's global batch, before the optimizer moved.
        train_losses_after: of the same batch, after it.
        validation_losses: of one validation mini-batch, after the step.
        validation_losses_before: of the same mini-batch, before the step.
        slots: [K] which mini-batch of its cycle each task's loss is from: small numbers, 0, 1, ...; a task's equal numbers
            stand for the same samples. Comes with `validation_losses`.
        output_gradient_norms: [K] Euclidean norms of the gradients of `train_losses` with respect to the output layer
            (weight and bias), at the parameters before the step.
        validation_output_gradient_norms: [K] those of `validation_losses`, at the parameters after the step.
        output_gradient_products: [K] inner product of the gradient of the *sum* of `validation_losses`, after the step, with
            the gradient of each of the `train_losses`, before it; both with respect to the output layer.
        full_gradient_products: [K] the same with respect to all trained parameters.
    """

    step: int
    train_losses: np.ndarray | None = None
    train_losses_after: np.ndarray | None = None
    validation_losses: np.ndarray | None = None
    validation_losses_before: np.ndarray | None = None
    slots: np.ndarray | None = None
    output_gradient_norms: np.ndarray | None = None
    validation_output_gradient_norms: np.ndarray | None = None
    output_gradient_products: np.ndarray | None = None
    full_gradient_products: np.ndarray | None = None


class Balancer(Protocol):
    """A method that chooses task weights. It is built from (resolved config, task names).

    Attributes:
        signals: the fields of `Signals` that it needs. A class has them too where they do not depend on the config.
        choice: the config's key that decides on the signals, or None. A class with one has `SIGNALS`: the key's values, each
            with its signals.
    """

    tasks: tuple[str, ...]
    signals: frozenset[str]
    choice: str | None

    def start(self, initial: np.ndarray) -> None:
        """Called once before the first step of a new run (not of a resumed one) with `initial` [K] float64: each task's
        mean loss on its full validation set. A method that divides by them raises UserError if one cannot be used."""

    def wants(self, step: int) -> bool:
        """Whether `observe` must be called after optimizer step `step` (1-based)."""

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        """[K] float64 with the sum 1 for the next step. `denominators` [K] are that step's N_k: supervised tokens, or
        samples, of each task in the global batch. The array is the caller's own."""

    def observe(self, signals: Signals) -> None:
        """Takes the measurements of one wanted step. Steps must increase."""

    def record(self) -> dict[str, Any]:
        """What there is to show, as JSON values: {"tasks": {NAME: {"weight": the next step's, ...}}, ...}; null where
        nothing is defined yet."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` restores the balancer bit for bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. Raises UserError where it is of other tasks."""


class SignalFree:
    """What the methods have in common that measure nothing: no observation, no state. A child defines `weights` and keeps
    what it gave last in `last`."""

    signals: frozenset[str] = frozenset()
    choice: str | None = None

    def __init__(self, tasks: tuple[str, ...]):
        self.tasks = tasks
        self.last: np.ndarray | None = None  # [K]

    def start(self, initial: np.ndarray) -> None:
        pass

    def wants(self, step: int) -> bool:
        return False

    def observe(self, signals: Signals) -> None:
        raise ValueError(f"{type(self).__name__} takes no observations")

    def record(self) -> dict[str, Any]:
        values = [None] * len(self.tasks) if self.last is None else plain(self.last)
        return {"tasks": {name: {"weight": value} for name, value in zip(self.tasks, values, strict=True)}}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Stateful:
    """What the methods have in common that go on, step by step, from arrays of numbers.

    A child has `kind`, and `signals` or `choice` with `SIGNALS`; gives its arrays to `__init__` and finds them in `state`:
    [..., K] with the tasks last, float64 with NaN for "nothing yet", or integers; defines `_learn`, `_weigh` and `_shown`. A
    task of which a measurement is missing leaves its part of every array as it is.
    """

    kind: str
    signals: frozenset[str]
    choice: str | None = None

    def __init__(self, tasks: tuple[str, ...], **state: np.ndarray):
        self.tasks = tasks
        self.state = state
        self._step = 0  # observed last

    def start(self, initial: np.ndarray) -> None:
        pass

    def wants(self, step: int) -> bool:
        return True

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        return self._weigh()

    def observe(self, signals: Signals) -> None:
        if signals.step <= self._step:
            raise ValueError(f"step {signals.step} was observed after step {self._step}")
        self._learn(signals)
        self._step = signals.step

    def record(self) -> dict[str, Any]:
        columns = {name: plain(values) for name, values in {"weight": self._weigh(), **self._shown()}.items()}
        rows = zip(*columns.values(), strict=True)
        return {"tasks": {name: dict(zip(columns, row, strict=True)) for name, row in zip(self.tasks, rows, strict=True)}}

    def state_dict(self) -> dict[str, Any]:
        head = {"kind": self.kind, "tasks": list(self.tasks), "signals": sorted(self.signals), "step": self._step}
        return {**head, **{name: plain(values) for name, values in self.state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.kind, self.tasks)
        if state["signals"] != sorted(self.signals):
            what = (
                f"the checkpoint is of a run whose {self.kind} looked at {', '.join(state['signals'])}; here it is {', '.join(sorted(self.signals))}"
            )
            raise UserError(what, f"balancer.{self.choice or 'kind'}", 'restore that setting, or start a new run with checkpoint.resume = "never"')
        self._step = state["step"]
        self.state = {name: np.array(state[name], values.dtype) for name, values in self.state.items()}  # None becomes NaN

    def _learn(self, signals: Signals) -> None:
        """Takes the measurements into `state`."""
        raise NotImplementedError

    def _weigh(self) -> np.ndarray:
        """[K] the next step's weights, a new array."""
        raise NotImplementedError

    def _shown(self) -> dict[str, np.ndarray]:
        """What a record shows of each task beside its weight: arrays [K]."""
        raise NotImplementedError


def check_state(state: dict[str, Any], kind: str, tasks: tuple[str, ...]) -> None:
    """Raises UserError for a state of another method than `kind`, or of other tasks or another order of them."""
    fix = 'restore that setting, or start a new run with checkpoint.resume = "never"'
    if state.get("kind") != kind:
        raise UserError(f"the checkpoint is of a run with another balancer than {kind}", "balancer.kind", fix)
    if state["tasks"] != list(tasks):
        raise UserError(f"the checkpoint's tasks are {', '.join(state['tasks'])}; the config's are {', '.join(tasks)}", "data.tasks", fix)


def divisors(initial: np.ndarray, tasks: tuple[str, ...], kind: str) -> np.ndarray:
    """`initial` [K] as float64, for a method that divides by the losses before training. Raises UserError for a task whose
    loss is not a positive number."""
    initial = np.array(initial, np.float64)
    if initial.shape != (len(tasks),):
        raise ValueError(f"initial losses have the shape {initial.shape}, not one for each of the tasks {tasks}")
    for name, loss in zip(tasks, initial.tolist(), strict=True):
        if not 0 < loss < np.inf:
            what = f"task {name}: the validation loss before training is {loss:g}; {kind} divides by it and needs a positive number"
            raise UserError(what, f"data.tasks, {name}", "look at this task's validation data and at the model's loss on it")
    return initial


def measured(values: np.ndarray | None, count: int, signed: bool = False) -> np.ndarray:
    """[count] losses, norms or, if `signed`, products, with NaN for what is no measurement: not finite, of a size above
    LARGEST_LOSS, or negative where not `signed`."""
    values = np.asarray(values, np.float64)
    if values.shape != (count,):
        raise ValueError(f"measurements have the shape {values.shape}, not ({count},)")
    return np.where((values <= LARGEST_LOSS) & (values >= (-LARGEST_LOSS if signed else 0)), values, np.nan)


def loss_ratios(losses: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """[K] losses / initial, LARGEST_LOSS at most; NaN where one is. `initial` is positive."""
    with np.errstate(over="ignore"):
        return np.minimum(losses / initial, LARGEST_LOSS)


def normalised(values: np.ndarray) -> np.ndarray:
    """[K] finite numbers of 0 and more, not all 0 -> positive ones in their proportions, with the sum 1."""
    scaled = np.maximum(values / values.max(), SMALLEST_WEIGHT)  # the sum of the scaled ones is at most K
    return scaled / scaled.sum()


def softmax(values: np.ndarray) -> np.ndarray:
    """exp(values) / sum(exp(values)), for finite values of any size. [n] -> [n]"""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def through_softmax(logits: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient with respect to `logits` [K] from that with respect to z = softmax(logits): z_k (g_k - sum_j z_j g_j).

    A task whose g is NaN takes no part: its result is NaN, and z is the softmax over the others.
    """
    there = ~np.isnan(gradient)
    result = np.full(len(gradient), np.nan)
    if there.any():
        z, g = softmax(logits[there]), gradient[there]
        # As sum_j z_j (g_k - g_j): where all g are equal it is exactly 0, and Adam makes full steps of rounding errors.
        result[there] = z * ((g[:, None] - g) * z).sum(axis=1)
    return result


def plain(values: np.ndarray) -> list[Any]:
    """An array as (nested) lists of Python numbers, with None for NaN. `json` writes and reads those without loss."""
    if values.dtype.kind == "i":
        return values.tolist()
    items = values.astype(object)
    items[np.isnan(values)] = None
    return items.tolist()
