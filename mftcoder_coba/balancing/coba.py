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

`scores` leaves parts out (Table 9 of the paper): RCS alone, ACS alone, or, without DF, the mean of both.
`variant` "mftcoder" is another formula of the same parts: see `coba_mftcoder`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mftcoder_coba.balancing.base import Signals, check_state, divisors, plain
from mftcoder_coba.balancing.coba_formulas import absolute_scores, divergence_factor, ols_slopes, paired_slopes, relative_scores
from mftcoder_coba.balancing.coba_mftcoder import balanced_and_floored, fitted_part, gapless_slopes, scored_part, unclipped_factor
from mftcoder_coba.balancing.history import History
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
    choice = None

    def __init__(self, config: CobaConfig, tasks: tuple[str, ...]):
        self.tasks = tasks
        self._config = config
        count = len(tasks)
        self._initial: np.ndarray | None = None  # [K] v(0)
        kept = None if config.variant == "mftcoder" else config.window  # its window does not always forget
        self._steps = History(limit=kept, dtype=np.int64)
        self._ratios = History((count,), kept)  # NaN where missing
        self._slots = History((count,), kept, np.int64)  # filled for paired slopes only
        self._slopes = History((count,), kept)
        self._alpha_max = History()  # of every observation since the start
        self._weights = np.full(count, 1.0 / count)
        self._shown = self._show(Signals(step=0))

    def start(self, initial: np.ndarray) -> None:
        """Raises UserError for a task whose loss before training is not a positive number: its ratio is undefined."""
        self._initial = divisors(initial, self.tasks, "coba")

    def wants(self, step: int) -> bool:
        return step % self._config.update_interval == 0

    def weights(self, denominators: np.ndarray) -> np.ndarray:
        return self._weights.copy()

    def observe(self, signals: Signals) -> None:
        """`validation_losses` [K]; what is not finite counts as missing. `slots` [K] are needed for paired slopes."""
        self._append(signals)
        slopes, worst = self._fit()
        self._slopes.append(slopes)
        self._alpha_max.append(worst)
        relative, absolute, factor = self._score()
        if len(self._alpha_max.values) >= self._config.warmup:
            # The formula's weights are positive. What is too small for float64 stays so.
            self._weights = np.maximum(self._blend(relative, absolute, factor), np.finfo(np.float64).tiny)
        self._shown = self._show(signals, slopes, relative, absolute, factor)

    def record(self) -> dict[str, Any]:
        """Per task valid_loss, ratio, slope, rcs, acs, weight (the next step's) and slot; df and alpha_max. A missing loss
        is null, and so is df before its history begins."""
        return {**self._shown, "tasks": {name: dict(shown) for name, shown in self._shown["tasks"].items()}}

    def state_dict(self) -> dict[str, Any]:
        histories = {name: plain(history.values) for name, history in self._histories().items()}
        initial = None if self._initial is None else plain(self._initial)
        head = {"kind": "coba", "tasks": list(self.tasks), "slope": self._config.slope, "variant": self._config.variant, "initial": initial}
        return {**head, **histories, "weights": plain(self._weights), "record": self.record()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other tasks, of another slope or variant. Window and warm-up are the config's: a longer
        window fills up, a shorter one forgets at once."""
        self._check(state)
        self._initial = None if state["initial"] is None else np.array(state["initial"], np.float64)
        for name, history in self._histories().items():
            history.load(state[name])
        self._weights = np.array(state["weights"], np.float64)
        self._shown = state["record"]

    def _check(self, state: dict[str, Any]) -> None:
        check_state(state, "coba", self.tasks)
        for name, value in (("slope", self._config.slope), ("variant", self._config.variant)):
            if state[name] != value:
                what = f'the checkpoint is of a run with {name} "{state[name]}"; the config says "{value}"'
                fix = 'restore that setting, or start a new run with checkpoint.resume = "never"'
                raise UserError(what, f"balancer.{name}", fix)

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

    def _fit(self) -> tuple[np.ndarray, float]:
        """The slopes [K] of t, and what stands for the worst of them in DF."""
        steps, ratios = self._steps.values, self._ratios.values
        if self._config.variant == "mftcoder":
            return gapless_slopes(ratios[fitted_part(len(ratios), self._config.window, self._config.update_interval)])
        slopes = paired_slopes(steps, ratios, self._slots.values) if self._config.slope == "paired" else ols_slopes(steps, ratios)
        return slopes, slopes.max()

    def _score(self) -> tuple[np.ndarray, np.ndarray, float | None]:
        """RCS [K], ACS [K] and DF of t; DF is None before its history begins."""
        slopes, worst, warmup = self._slopes.values, self._alpha_max.values, self._config.warmup
        relative = relative_scores(slopes[-1])
        if self._config.variant == "mftcoder":
            absolute = absolute_scores(slopes[scored_part(len(slopes), self._config.window, warmup)])
            return relative, absolute, unclipped_factor(worst[warmup - 1 :], self._config.tau) if len(worst) >= warmup else None
        first = warmup if self._config.df_history == "warmup" else 1
        factor = divergence_factor(worst[first - 1 :], self._config.tau) if len(worst) >= first else None
        return relative, absolute_scores(slopes), factor

    def _blend(self, relative: np.ndarray, absolute: np.ndarray, factor: float) -> np.ndarray:
        """The weights [K] of t."""
        if "df" in self._config.scores:
            blend = factor * relative + (1.0 - factor) * absolute
            return balanced_and_floored(blend) if self._config.variant == "mftcoder" else blend
        chosen = [score for name, score in (("rcs", relative), ("acs", absolute)) if name in self._config.scores]
        return sum(chosen) / len(chosen)

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
        return {"tasks": tasks, "df": factor, "alpha_max": None if slopes is None else float(self._alpha_max.values[-1])}
