"""What the figures draw, as arrays: means over seeds on one axis of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mftcoder_coba.comparing.results import Outcome
from mftcoder_coba.reporting import Series
from mftcoder_coba.reporting.summary import best_step


@dataclass(frozen=True)
class Curves:
    """One method. All curves are means over its seeds.

    Attributes:
        ratio: task -> (steps, full validation ratios), the start among them.
        mean_ratio: (steps, their mean over tasks); None for single-task runs, whose steps differ.
        weights: task -> (steps, weights as used); empty for single-task runs.
        selected: the step of the selected checkpoint of each seed; empty for single-task runs.
        best: mean over seeds and tasks of the ratio at the selected checkpoints; NaN if a task has none.
    """

    method: str
    single: bool
    ratio: dict[str, tuple[NDArray, NDArray]]
    mean_ratio: tuple[NDArray, NDArray] | None
    weights: dict[str, tuple[NDArray, NDArray]]
    selected: list[int]
    best: float


def curves_of(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[Curves]:
    """One for each method, in the order of the outcomes.

    A step of a single-task run is drawn where the mixture has made as many passes over the task: at the same part of the longest run.
    """
    last = max((outcome.run.metrics.last_step for outcome in outcomes if outcome.task is None), default=0)
    return [_of_method([outcome for outcome in outcomes if outcome.method == method], tasks, last) for method in _methods(outcomes)]


def normalised(values: NDArray) -> NDArray:
    """(value - least) / (largest - least): 0 at the minimum, 1 at the maximum. A flat curve is 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _methods(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.method for outcome in outcomes))


def _of_method(members: Sequence[Outcome], tasks: Sequence[str], last: int) -> Curves:
    single = members[0].task is not None

    def drawn(outcome: Outcome, name: str, task: str) -> tuple[NDArray, NDArray]:
        series: Series = getattr(outcome.run.metrics, "train" if name == "weight" else "validation")
        values = series.value(name) if task == "" else series.of_task(task, name)
        stretch = last / max(outcome.run.metrics.last_step, 1) if single and last else 1.0
        seen = np.isfinite(values)
        return series.steps[seen] * stretch, values[seen]

    def mean(name: str, task: str = "") -> tuple[NDArray, NDArray]:
        return _mean([drawn(outcome, name, task) for outcome in members if outcome.task in (None, task)])

    ratio = {task: curve for task in tasks if len((curve := mean("ratio", task))[0])}
    if single:
        return Curves(members[0].method, True, ratio, None, {}, [], _best(members, tasks))
    weights = {task: curve for task in tasks if len((curve := mean("weight", task))[0])}
    selected = [best.step for outcome in members if (best := best_step(outcome.run))]
    return Curves(members[0].method, False, ratio, mean("mean_ratio"), weights, selected, _best(members, tasks))


def _mean(curves: Sequence[tuple[NDArray, NDArray]]) -> tuple[NDArray, NDArray]:
    """Mean of curves at the steps of the first. Seeds pack their data differently: their last steps may differ a little."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.array([]), np.array([])
    steps = curves[0][0]
    return steps, np.mean([np.interp(steps, *curve) for curve in curves], axis=0)


def _best(members: Sequence[Outcome], tasks: Sequence[str]) -> float:
    found: dict[str, list[float]] = {task: [] for task in tasks}
    for outcome in members:
        best = best_step(outcome.run)
        row = outcome.run.metrics.validation.index_of(best.step) if best else None
        for task in [outcome.task] if outcome.task else tasks:
            if row is not None:
                found[task].append(float(outcome.run.metrics.validation.of_task(task, "ratio")[row]))
    return float(np.mean([np.mean(values) if values else np.nan for values in found.values()]))
