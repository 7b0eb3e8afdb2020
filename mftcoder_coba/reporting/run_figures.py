"""The figures of one run. Each function takes a `Run` and returns a Figure, or None where the run has nothing to show.

A task has one colour and line style in all figures: that of its place in `order`, the names of all tasks of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mftcoder_coba.reporting.figures import COLOURS, GREY, Chart, Sheet, dashed_entry, extent, is_noisy, limit
from mftcoder_coba.reporting.gate_figures import common_share, expert_gates
from mftcoder_coba.reporting.records import Run, Series
from mftcoder_coba.reporting.summary import best_step

# Of the balancer's records: what other figures show, and numbers that are no measure of anything.
SHOWN_ELSEWHERE = {"weight", "valid_loss", "rcs", "acs", "df", "slot", "seconds"}
# Names of values as people write them; the others are words already.
LABELS = {"alpha_max": "largest slope", "rcs": "RCS", "acs": "ACS", "df": "DF"}

Order = Sequence[str] | None


def validation_ratio(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """Full validations as joined markers; the balancer's mini-batches as a faint line behind."""
    full, stream = run.metrics.validation, run.metrics.balancer
    observed = {task: stream.of_task(task, "valid_loss") / _loss_before(run, task) for task in run.tasks}
    ratios = {task: full.of_task(task, "ratio") for task in run.tasks}
    if not _finite(observed.values()) and not _finite(ratios.values()):
        return None
    sheet = _sheet(run, narrow, order)
    (axes,) = sheet.panels()
    for task in run.tasks:
        sheet.line(axes, task, stream.steps, observed[task], faint=True)
        sheet.line(axes, task, full.steps, ratios[task], marker="o")
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    best = best_step(run)
    if best is not None:
        sheet.mark(axes, best.step, f"best step {best.step}")
    low, high = extent([*ratios.values(), np.ones(1)], wild=0.0)
    if _finite(observed.values()):  # a few wild mini-batches must not press the curves flat
        lowest, highest = extent([np.concatenate(list(observed.values()))])
        low, high = min(low, lowest), max(high, highest)
    limit(axes, low, high)
    axes.set_ylabel("validation loss / loss before")
    return sheet.finish()


def weights(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """Weights as used in each step."""
    train = run.metrics.train
    columns = {task: train.of_task(task, "weight") for task in run.tasks}
    if not _finite(columns.values()):
        return None
    sheet = _sheet(run, narrow, order)
    (axes,) = sheet.panels()
    noisy = any(is_noisy(values) for values in columns.values())
    for task, values in columns.items():
        (sheet.smooth_line if noisy else sheet.line)(axes, task, train.steps, values)
    equal = 1 / len(run.tasks)
    sheet.level(axes, equal)
    highest = extent([*columns.values(), np.array([equal])], wild=1.0 if noisy else 0.0)[1]
    axes.set_ylim(0, 1.15 * highest)
    _mark_warmup(sheet, axes, run)
    axes.set_ylabel("weight in the loss")
    return sheet.finish([dashed_entry(f"1/K = {equal:.3g}")])


def coba_scores(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """RCS and ACS per task, and DF, over one another."""
    balancer = run.metrics.balancer
    if not _finite(balancer.of_task(task, "rcs") for task in run.tasks):
        return None
    sheet = _sheet(run, narrow, order)
    relative, absolute, divergence = panels = sheet.panels(3)
    for axes, name in ((relative, "rcs"), (absolute, "acs")):
        for task in run.tasks:
            sheet.line(axes, task, balancer.steps, balancer.of_task(task, name))
        sheet.level(axes, 1 / len(run.tasks))
        axes.set_ylabel(LABELS[name])
        axes.set_ylim(bottom=0)
    sheet.plain_line(divergence, balancer.steps, balancer.value("df"))
    divergence.set_ylim(-0.04, 1.08)
    divergence.set_ylabel(LABELS["df"])
    for axes in panels:
        _mark_warmup(sheet, axes, run, named=axes is relative)
    return sheet.finish()


def balancer_values(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """Whatever else the method records, by its name: a panel for each value of the tasks, and for each of the whole run."""
    balancer = run.metrics.balancer
    by_task = [name for name in names_of(balancer) if name not in SHOWN_ELSEWHERE]
    of_run = [name for name, values in balancer.values.items() if name not in SHOWN_ELSEWHERE and np.isfinite(values).any()]
    if not by_task and not of_run:
        return None
    sheet = _sheet(run, narrow, order)
    panels = sheet.panels(len(by_task) + len(of_run))
    for axes, name in zip(panels, by_task + of_run, strict=True):
        columns = {task: balancer.of_task(task, name) for task in run.tasks} if name in by_task else {"": balancer.value(name)}
        noisy = any(is_noisy(values) for values in columns.values())
        for task, values in columns.items():
            if not task:
                sheet.plain_line(axes, balancer.steps, values)
            else:
                (sheet.smooth_line if noisy else sheet.line)(axes, task, balancer.steps, values)
        low, high = extent(columns.values())
        limit(axes, low, high)
        if low < 0 < high:
            axes.axhline(0.0, color=GREY, linewidth=0.8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.set_ylabel(LABELS.get(name, name.replace("_", " ")))
        _mark_warmup(sheet, axes, run, named=axes is panels[0])
    return sheet.finish(legend=bool(by_task))


def train_loss(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """Running means over the faint losses of single steps; a task's own steps only."""
    train = run.metrics.train
    columns = [train.of_task(task, "loss") for task in run.tasks]
    if not _finite(columns):
        return None
    sheet = _sheet(run, narrow, order)
    (axes,) = sheet.panels()
    for task, values in zip(run.tasks, columns, strict=True):
        sheet.smooth_line(axes, task, train.steps, values)
    limit(axes, *extent([np.concatenate(columns)], wild=0.5))
    axes.set_ylabel("training loss, nats per token")
    return sheet.finish()


def optimizer(run: Run, narrow: bool = False, order: Order = None) -> Figure | None:
    """Learning rate and gradient norm."""
    train = run.metrics.train
    labels = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}
    shown = [(name, label) for name, label in labels.items() if np.isfinite(train.value(name)).any()]
    if not shown:
        return None
    sheet = _sheet(run, narrow, order)
    for axes, (name, label) in zip(sheet.panels(len(shown), height=1.5), shown, strict=True):
        sheet.plain_line(axes, train.steps, train.value(name), colour=COLOURS[0])
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15 * np.nanmax(train.value(name)) or 1.0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    return sheet.finish(legend=False)


CHARTS = (
    Chart(
        "validation_ratio",
        "Validation loss ratio per task",
        "Each task's validation loss over its loss before training: lower is better, and a line that turns up shows a task past its minimum. "
        "Markers are full validations; faint lines, where there are any, are the balancer's mini-batches.",
        validation_ratio,
    ),
    Chart(
        "weights",
        "Task weights",
        "The factor of each task in the loss, step by step: above the dashed line 1/K a task is pushed, below it is held back. "
        "Where the weights jump from step to step, the strong lines are running means.",
        weights,
    ),
    Chart(
        "coba_scores",
        "CoBa scores",
        "The weights are DF x RCS + (1 - DF) x ACS: RCS favours the task that converges slowest among all, ACS the task that still improves "
        "compared with its own past, and DF falls from 1 when some task begins to diverge.",
        coba_scores,
    ),
    Chart(
        "balancer_values",
        "What the balancer works with",
        "The method's own values, under the names of its records, as they were after each observation. "
        "Where they jump from step to step, the strong lines are running means.",
        balancer_values,
    ),
    Chart(
        "train_loss",
        "Training loss per task",
        "The strong lines are running means, the faint ones single steps; a step without the task has no point.",
        train_loss,
    ),
    Chart(
        "optimizer",
        "Learning rate and gradient norm",
        "The gradient norm is taken before clipping: a lasting rise points to an unstable run.",
        optimizer,
    ),
    Chart(
        "expert_gates",
        "Expert gates per task and layer",
        "How much of each expert a task's gate lets through, in each layer, at the best step: red is more than an even part, blue is less. "
        "Experts named common belong to all tasks of a cluster, whose name stands in brackets; those named own belong to the task alone.",
        expert_gates,
    ),
    Chart(
        "common_share",
        "Share of the common experts over training",
        "What each task's gate gives to all common experts of its cluster together, the mean over the layers; the rest goes to the task's own "
        "experts. The dashed line is that of even gates.",
        common_share,
    ),
)


def names_of(series: Series) -> list[str]:
    """The values that some task has, in the order in which they first appear."""
    found = {name: None for columns in series.tasks.values() for name, values in columns.items() if np.isfinite(values).any()}
    return list(found)


def _sheet(run: Run, narrow: bool, order: Order) -> Sheet:
    return Sheet(run.tasks, run.metrics.last_step, narrow, order)


def _finite(columns: Iterable[NDArray[np.float64]]) -> bool:
    return any(np.isfinite(values).any() for values in columns)


def _loss_before(run: Run, task: str) -> float:
    """v(0), or NaN where it is unknown or no divisor."""
    start = run.metrics.validation.index_of(0)
    return float("nan") if start is None else float(run.metrics.validation.of_task(task, "loss")[start]) or float("nan")


def _mark_warmup(sheet: Sheet, axes: Axes, run: Run, named: bool = True) -> None:
    """Where CoBa's warm-up ends; W is in observations."""
    observations = run.setting("balancer.warmup")
    if run.setting("balancer.kind") != "coba" or not isinstance(observations, int):
        return
    step = observations * (run.setting("balancer.update_interval") or 1)
    if step <= run.metrics.last_step:
        sheet.mark(axes, step, "warm-up ends" if named else "")
