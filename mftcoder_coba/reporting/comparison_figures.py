"""The figures of several runs together. A run has one colour and line style in all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mftcoder_coba.reporting.comparison import Comparison
from mftcoder_coba.reporting.figures import GREY, Chart, Sheet, extent, is_noisy, limit
from mftcoder_coba.reporting.records import Run
from mftcoder_coba.reporting.summary import best_step

# So many times the highest ratio of the calmest line is where the axes end.
LEAVES = 1.5

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]  # steps, values


def mean_ratio(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """One line for each run, with its best step marked."""
    curves = [(run.metrics.validation.steps, run.metrics.validation.value("mean_ratio")) for run in comparison.runs]
    if not any(np.isfinite(values).any() for _, values in curves):
        return None
    sheet = Sheet(comparison.labels, comparison.last_step, narrow)
    (axes,) = sheet.panels()
    for label, run, (steps, values) in zip(comparison.labels, comparison.runs, curves, strict=True):
        sheet.line(axes, label, steps, values)
        _mark_best(sheet, axes, label, run, steps, values)
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    limit(axes, *_ratio_extent([values for _, values in curves]))
    axes.set_ylabel("mean validation loss ratio")
    return sheet.finish()


def task_ratios(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """A panel for each task, one line for each run that has it."""

    def curve(run: Run, task: str) -> Curve:
        return run.metrics.validation.steps, run.metrics.validation.of_task(task, "ratio")

    def draw(sheet: Sheet, axes: Axes, label: str, run: Run, steps: NDArray, values: NDArray) -> None:
        sheet.line(axes, label, steps, values)
        _mark_best(sheet, axes, label, run, steps, values)

    return _small_panels(comparison, narrow, curve, draw, "loss ratio", _ratio_extent)


def task_weights(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """A panel for each task, one line for each run that has it."""

    def curve(run: Run, task: str) -> Curve:
        return run.metrics.train.steps, run.metrics.train.of_task(task, "weight")

    def draw(sheet: Sheet, axes: Axes, label: str, run: Run, steps: NDArray, values: NDArray) -> None:
        (sheet.smooth_line if is_noisy(values) else sheet.line)(axes, label, steps, values)

    def reach(columns: list[NDArray]) -> tuple[float, float]:
        return 0.0, extent(columns)[1]

    return _small_panels(comparison, narrow, curve, draw, "weight", reach)


CHARTS = (
    Chart(
        "mean_ratio",
        "Mean validation loss ratio by run",
        "The mean over a run's own tasks of validation loss over loss before training: lower is better. "
        "The ring is at the run's best step; a line that leaves the axes has diverged.",
        mean_ratio,
    ),
    Chart(
        "task_ratios",
        "Validation loss ratio per task, by run",
        "One panel per task, all on the same axes. A run without the task has no line there. "
        "The ring is at the run's best step, which is one for all its tasks; a line that leaves the axes has diverged.",
        task_ratios,
    ),
    Chart(
        "task_weights",
        "Weight per task, by run",
        "One panel per task, all on the same axes. Where a run's weights jump from step to step, its strong line is the running mean.",
        task_weights,
    ),
)


def _small_panels(
    comparison: Comparison,
    narrow: bool,
    curve: Callable[[Run, str], Curve],
    draw: Callable[..., None],
    label: str,
    reach: Callable[[list[NDArray]], tuple[float, float]],
) -> Figure | None:
    """`curve` gives what of a run and task `draw` puts on a panel; `reach` gives the value axis of all of them."""
    curves = {(run_label, task): curve(run, task) for run_label, run in zip(comparison.labels, comparison.runs, strict=True) for task in run.tasks}
    if not any(np.isfinite(values).any() for _, values in curves.values()):
        return None
    tasks = comparison.tasks
    columns = min(len(tasks), 2 if narrow else 3) if len(tasks) != 4 else 2
    sheet = Sheet(comparison.labels, comparison.last_step, narrow)
    low, high = reach([values for _, values in curves.values()])
    for number, (axes, task) in enumerate(zip(sheet.panels(len(tasks), columns, height=1.9 if narrow else 2.6), tasks, strict=True)):
        for run_label, run in zip(comparison.labels, comparison.runs, strict=True):
            if task in run.tasks:
                draw(sheet, axes, run_label, run, *curves[run_label, task])
        if low <= 1.0 <= high:
            axes.axhline(1.0, color=GREY, linewidth=0.8)
        sheet.title(axes, task, columns)
        limit(axes, low, high)
        if number % columns == 0:
            axes.set_ylabel(label)
    return sheet.finish()


def _ratio_extent(columns: list[NDArray]) -> tuple[float, float]:
    """From the lowest ratio to the highest; but a run that diverges must not press the others flat."""
    low, high = extent([*columns, np.ones(1)], wild=0.0)
    calmest = min(float(np.nanmax(values)) for values in columns if np.isfinite(values).any())
    return low, min(high, LEAVES * max(calmest, 1.0))


def _mark_best(sheet: Sheet, axes: Axes, label: str, run: Run, steps: NDArray, values: NDArray) -> None:
    best, index = best_step(run), None
    if best is not None:
        index = run.metrics.validation.index_of(best.step)
    if index is not None:
        axes.plot(steps[index], values[index], "o", markersize=7, markerfacecolor="none", color=sheet.styles[label][0], zorder=3)
