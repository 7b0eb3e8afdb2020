"""`coba`: the convergence balancer, arXiv 2410.06741.

With v_k(t) the validation loss of task k at observation t = 1, 2, ... and v_k(0) the one before training:

    ratio    y_k(t) = v_k(t) / v_k(0)
    slope    a_k(t) = least-squares slope of y_k over the last N observations, by true step numbers
    RCS      softmax over tasks of  K a_k(t) / sum_j |a_j(t)|
    ACS      softmax over tasks of  -n a_k(t) / sum of |a_k| over the last n = min(N, t) slopes
    a_max    a_max(t) = max_k a_k(t), with its sign
    DF       min(m softmax_j(-tau m a_max(j) / sum_j |a_max(j)|) at j = t, 1), j = W..t, m = t - W + 1
    weight   DF RCS + (1 - DF) ACS

RCS gives more to the tasks that converge slower than the others; ACS gives less to a task that turns up against its own
past; DF is 1 while all tasks converge and falls when the worst slope rises, which hands over from RCS to ACS.

Where the paper leaves a choice:
- The weights of t are used from the next step on. Before t = W they are 1 / K, so the first W observed steps train with
  1 / K, and with an update interval of u those are the first W u steps.
- v_k(0) only scales: it is not a point of the fit.
- A slope that is undefined is 0 and counts as a slope. Zero denominators: RCS is uniform, ACS's argument is 0, DF is 1.
- The absolute value in DF's denominator. Without it the sign of the whole argument turns, and the diverging task gains.
- `df_history` "all" starts DF's sum at j = 1 instead of W; the first slopes are mostly noise and hold DF down for long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mftcoder_coba.balancing.base import History, Signals, plain, softmax
from mftcoder_coba.config import CobaConfig
from mftcoder_coba.errors import UserError

# A larger ratio is as good as infinite: squares and sums of it could leave float64.
LARGEST_RATIO = 1e100


class Coba:
    """CoBa over K tasks. Windows and warm-up count observations; slopes are per optimizer step.

    Args:
        config: resolved, with numbers for `window` and `warmup`.
        tasks: the K names.
    """

    signals = frozenset({"validation_losses"})

    def __init__(self, config: CobaConfig, tasks: tuple[str, ...]):
        self.tasks = tasks
        self._config = config
        count = len(tasks)
        self._initial: np.ndarray | None = None  # [K] v(0)
        self._steps = History(limit=config.window, dtype=np.int64)
        self._ratios = History((count,), config.window)  # NaN where missing
        self._slots = History((count,), config.window, np.int64)  # filled for paired slopes only
        self._slopes = History((count,), config.window)
        self._alpha_max = History()  # of every observation since the start
        self._weights = np.full(count, 1.0 / count)
        self._shown = self._show(Signals(step=0))

    def start(self, initial: np.ndarray) -> None:
        """Raises UserError for a task whose loss before training is not a positive number: its ratio is undefined."""
        initial = np.array(initial, np.float64)
        if initial.shape != (len(self.tasks),):
            raise ValueError(f"initial losses have the shape {initial.shape}, not one for each of the tasks {self.tasks}")
        for name, loss in zip(self.tasks, initial.tolist(), strict=True):
            if not 0 < loss < np.inf:
                what = f"task {name}: the validation loss before training is {loss:g}; CoBa divides by it and needs a positive number"
                raise UserError(what, f"data.tasks, {name}", "look at this task's validation data and at the model's loss on it")
        self._initial = initial

    def wants(self, step: int) -> bool:
        return step % self._config.update_interval == 0

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        return self._weights.copy()

    def observe(self, signals: Signals) -> None:
        """`validation_losses` [K]; what is not finite counts as missing. `slots` [K] are needed for paired slopes."""
        self._append(signals)
        slopes = self._fit()
        self._slopes.append(slopes)
        self._alpha_max.append(slopes.max())

        relative, absolute = relative_scores(slopes), absolute_scores(self._slopes.values)
        worst = self._alpha_max.values  # [t]
        first = self._config.warmup if self._config.df_history == "warmup" else 1
        factor = divergence_factor(worst[first - 1 :], self._config.tau) if len(worst) >= first else None
        if len(worst) >= self._config.warmup:
            # The formula's weights are positive. What is too small for float64 stays so.
            self._weights = np.maximum(factor * relative + (1.0 - factor) * absolute, np.finfo(np.float64).tiny)
        self._shown = self._show(signals, slopes, relative, absolute, factor)

    def record(self) -> dict[str, Any]:
        """Per task valid_loss, ratio, slope, rcs, acs, weight (the next step's) and slot; df and alpha_max. A missing loss
        is null, and so is df before its history begins."""
        return {**self._shown, "tasks": {name: dict(shown) for name, shown in self._shown["tasks"].items()}}

    def state_dict(self) -> dict[str, Any]:
        histories = {name: plain(history.values) for name, history in self._histories().items()}
        initial = None if self._initial is None else plain(self._initial)
        head = {"tasks": list(self.tasks), "slope": self._config.slope, "initial": initial}
        return {**head, **histories, "weights": plain(self._weights), "record": self.record()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other tasks or of another slope. Window and warm-up are the config's: a longer
        window fills up, a shorter one forgets at once."""
        self._check(state)
        self._initial = None if state["initial"] is None else np.array(state["initial"], np.float64)
        for name, history in self._histories().items():
            history.load(state[name])
        self._weights = np.array(state["weights"], np.float64)
        self._shown = state["record"]

    def _check(self, state: dict[str, Any]) -> None:
        fix = 'restore that setting, or start a new run with checkpoint.resume = "never"'
        if "ratios" not in state:
            raise UserError("the checkpoint is of a run with another balancer than coba", "balancer.kind", fix)
        if state["tasks"] != list(self.tasks):
            what = f"the checkpoint's tasks are {', '.join(state['tasks'])}; the config's are {', '.join(self.tasks)}"
            raise UserError(what, "data.tasks", fix)
        if state["slope"] != self._config.slope:
            what = f'the checkpoint is of a run with slope "{state["slope"]}"; the config says "{self._config.slope}"'
            raise UserError(what, "balancer.slope", fix)

    def _histories(self) -> dict[str, History]:
        return {"steps": self._steps, "ratios": self._ratios, "slots": self._slots, "slopes": self._slopes, "alpha_max": self._alpha_max}

    def _append(self, signals: Signals) -> None:
        """Checks one observation and puts it into the window."""
        if self._initial is None:
            raise ValueError("observe came before start")
        if len(self._steps.values) and signals.step <= self._steps.values[-1]:
            raise ValueError(f"step {signals.step} was observed after step {self._steps.values[-1]}")
        losses = np.asarray(signals.validation_losses, np.float64)
        if losses.shape != self._initial.shape:
            raise ValueError(f"validation losses have the shape {losses.shape}, not {self._initial.shape}")
        if self._config.slope == "paired":
            slots = np.asarray(signals.slots)
            if slots.shape != losses.shape or slots.dtype.kind not in "iu" or slots.min() < 0:
                raise ValueError(f"paired slopes need a slot, 0 or more, for each task; got {signals.slots}")
            self._slots.append(slots)
        self._steps.append(signals.step)
        self._ratios.append(self._ratios_of(losses))

    def _ratios_of(self, losses: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            ratios = losses / self._initial
        return np.where(np.abs(ratios) <= LARGEST_RATIO, ratios, np.nan)

    def _fit(self) -> np.ndarray:
        if self._config.slope == "paired":
            return paired_slopes(self._steps.values, self._ratios.values, self._slots.values)
        return ols_slopes(self._steps.values, self._ratios.values)

    def _show(
        self,
        signals: Signals,
        slopes: np.ndarray | None = None,
        relative: np.ndarray | None = None,
        absolute: np.ndarray | None = None,
        factor: float | None = None,
    ) -> dict[str, Any]:
        nothing = [None] * len(self.tasks)
        losses = None if signals.validation_losses is None else np.array(signals.validation_losses, np.float64)
        columns = {
            "valid_loss": nothing if losses is None else plain(np.where(np.isfinite(losses), losses, np.nan)),
            "ratio": nothing if losses is None else plain(self._ratios.values[-1]),
            "slope": nothing if slopes is None else plain(slopes),
            "rcs": nothing if relative is None else plain(relative),
            "acs": nothing if absolute is None else plain(absolute),
            "weight": plain(self._weights),
            "slot": nothing if signals.slots is None else plain(np.asarray(signals.slots, np.int64)),
        }
        rows = zip(*columns.values(), strict=True)
        tasks = {name: dict(zip(columns, row, strict=True)) for name, row in zip(self.tasks, rows, strict=True)}
        return {"tasks": tasks, "df": factor, "alpha_max": None if slopes is None else float(slopes.max())}


def ols_slopes(steps: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Least-squares slope of each task's line: [n] steps, [n, K] ratios (NaN: missing) -> [K]; 0 where there are fewer than
    two ratios."""
    seen = ~np.isnan(ratios)
    if seen.all():
        seen = seen[:, :1]  # the steps are then the same for every task: one column of them does for all
    x = (steps - steps[-1])[:, None] * seen  # from the newest step, so that the numbers are small
    x = (x - x.sum(axis=0) / np.maximum(np.count_nonzero(seen, axis=0), 1)) * seen
    # Any number may be taken off a task's ratios. With one of them constant ratios become 0, and so does their slope,
    # exactly: ACS would blow a rounding error up to a full score.
    y = ratios - np.fmin.reduce(ratios, axis=0)
    np.copyto(y, 0.0, where=~seen)
    y *= x  # in place: at this size new memory costs more than the arithmetic
    return _quotient(y.sum(axis=0), (x * x).sum(axis=0))


def paired_slopes(steps: np.ndarray, ratios: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Least-squares slope of each task with one intercept per slot, so that only ratios of equal samples are compared.

    With x and y less their means over the slot: a = sum x y / sum x^2. (This program's own; the paper has the plain fit only.)

    Args:
        steps: [n]. ratios: [n, K], NaN where missing. slots: [n, K], 0 or more; a task's own numbering. Memory grows with
            the largest.

    Returns:
        [K]; 0 where no slot of the task has two ratios.
    """
    seen = ~np.isnan(ratios)
    tasks, slot_count = ratios.shape[1], int(slots.max()) + 1
    # One number per task and slot says which intercept a ratio has; what is missing goes to a line of its own.
    lines = np.where(seen, slots + slot_count * np.arange(tasks), slot_count * tasks).ravel()
    size = slot_count * tasks + 1
    x = np.repeat((steps - steps[-1]).astype(np.float64), tasks)
    x -= (np.bincount(lines, x, size) / np.maximum(np.bincount(lines, minlength=size), 1))[lines]
    y = np.where(seen, ratios, 0.0).ravel()
    lowest = np.full(size, np.inf)
    np.minimum.at(lowest, lines, y)
    y -= lowest[lines]  # for the reason given in ols_slopes
    x, y = x.reshape(seen.shape), y.reshape(seen.shape)
    x *= seen
    y *= x
    x *= x
    return _quotient(y.sum(axis=0), x.sum(axis=0))


def relative_scores(slopes: np.ndarray) -> np.ndarray:
    """RCS: [K] slopes at t -> [K] with the sum 1."""
    return softmax(len(slopes) * _quotient(slopes, np.abs(slopes).sum()))


def absolute_scores(slopes: np.ndarray) -> np.ndarray:
    """ACS: [n, K] the last n slopes, those of t at the end -> [K] with the sum 1."""
    return softmax(-len(slopes) * _quotient(slopes[-1], np.abs(slopes).sum(axis=0)))


def divergence_factor(worst: np.ndarray, tau: float) -> float:
    """DF: [m] a_max of the observations that count, that of t at the end -> a number from 0 to 1."""
    count = len(worst)
    return min(count * float(softmax(-tau * count * _quotient(worst, np.abs(worst).sum()))[-1]), 1.0)


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)
