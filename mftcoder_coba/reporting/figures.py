"""The figures of a run. Each function takes a `Run` and returns a Figure, or None where the run has nothing to show.

A task has one colour and line style in all figures. `narrow` draws for a phone: smaller, with letters that stay legible there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mftcoder_coba.reporting.records import Run, Series
from mftcoder_coba.reporting.summary import best_step

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow (too pale for a line).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
# Past the seventh task the colours return with another line style.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
GREY = "#666666"
DPI = 150


@dataclass(frozen=True)
class Chart:
    """A figure of the report: file name without suffix, title, a sentence on how to read it, and what draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure | None]


def style_of(tasks: list[str], task: str) -> tuple[str, tuple[float, ...]]:
    """Colour and dash pattern (in line widths) of a task."""
    number = tasks.index(task)
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def validation_ratio(run: Run, narrow: bool = False) -> Figure | None:
    """Full validations as joined markers; the balancer's mini-batches as a faint line behind."""
    full, stream = run.metrics.validation, run.metrics.balancer
    if not _any(run, full, "ratio") and not _any(run, stream, "ratio"):
        return None
    figure, (axes,) = _canvas(run, narrow)
    for task in run.tasks:
        _line(axes, run, task, stream.steps, stream.of_task(task, "ratio"), faint=True)
        _line(axes, run, task, full.steps, full.of_task(task, "ratio"), marker="o")
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    best = best_step(run)
    if best is not None:
        _mark(axes, best.step, f"best step {best.step}")
    # A few wild mini-batches must not press the curves flat.
    curves = np.concatenate([full.of_task(task, "ratio") for task in run.tasks] + [[1.0]])
    noise = np.concatenate([stream.of_task(task, "ratio") for task in run.tasks])
    noise = noise[np.isfinite(noise)]
    low, high = np.nanmin(curves), np.nanmax(curves)
    if len(noise):
        low, high = min(low, np.percentile(noise, 1)), max(high, np.percentile(noise, 99))
    _limit(axes, low, high)
    axes.set_ylabel("validation loss / loss before")
    return _finish(figure, run, narrow)


def weights(run: Run, narrow: bool = False) -> Figure | None:
    """Weights as used in each step."""
    train = run.metrics.train
    if not _any(run, train, "weight"):
        return None
    figure, (axes,) = _canvas(run, narrow)
    for task in run.tasks:
        _line(axes, run, task, train.steps, train.of_task(task, "weight"))
    axes.axhline(1 / len(run.tasks), color=GREY, linewidth=0.9, dashes=(4, 3))
    highest = np.nanmax(np.concatenate([train.of_task(task, "weight") for task in run.tasks] + [[1 / len(run.tasks)]]))
    axes.set_ylim(0, 1.15 * highest)
    _mark_warmup(axes, run)
    axes.set_ylabel("weight in the loss")
    extra = [Line2D([], [], color=GREY, linewidth=0.9, dashes=(4, 3), label=f"1/K = {1 / len(run.tasks):.3g}")]
    return _finish(figure, run, narrow, extra)


def coba_scores(run: Run, narrow: bool = False) -> Figure | None:
    """RCS and ACS per task, and DF, over one another."""
    balancer = run.metrics.balancer
    if not _any(run, balancer, "rcs"):
        return None
    figure, (relative, absolute, divergence) = _canvas(run, narrow, panels=3)
    for axes, name in ((relative, "rcs"), (absolute, "acs")):
        for task in run.tasks:
            _line(axes, run, task, balancer.steps, balancer.of_task(task, name))
        axes.axhline(1 / len(run.tasks), color=GREY, linewidth=0.8, dashes=(4, 3))
        axes.set_ylabel(name.upper())
        axes.set_ylim(bottom=0)
    df = balancer.value("df")
    seen = np.isfinite(df)
    divergence.plot(balancer.steps[seen], df[seen], color="black", linewidth=1.4, marker="o" if seen.sum() == 1 else "")
    divergence.set_ylim(-0.04, 1.08)
    divergence.set_ylabel("DF")
    for axes in (relative, absolute, divergence):
        _mark_warmup(axes, run, named=axes is relative)
    return _finish(figure, run, narrow)


def train_loss(run: Run, narrow: bool = False) -> Figure | None:
    """Running means over the faint losses of single steps; a task's own steps only."""
    train = run.metrics.train
    if not _any(run, train, "loss"):
        return None
    figure, (axes,) = _canvas(run, narrow)
    shown = []
    for task in run.tasks:
        loss = train.of_task(task, "loss")
        seen = np.isfinite(loss)
        steps, loss = train.steps[seen], loss[seen]
        _line(axes, run, task, steps, loss, faint=True)
        _line(axes, run, task, steps, running_mean(loss))
        shown.append(loss)
    values = np.concatenate(shown)
    _limit(axes, np.percentile(values, 0.5), np.percentile(values, 99.5))
    axes.set_ylabel("training loss, nats per token")
    return _finish(figure, run, narrow)


def optimizer(run: Run, narrow: bool = False) -> Figure | None:
    """Learning rate and gradient norm."""
    train = run.metrics.train
    labels = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}
    panels = [(name, label) for name, label in labels.items() if np.isfinite(train.value(name)).any()]
    if not panels:
        return None
    figure, all_axes = _canvas(run, narrow, panels=len(panels), height=1.5)
    for axes, (name, label) in zip(all_axes, panels, strict=True):
        seen = np.isfinite(train.value(name))
        axes.plot(train.steps[seen], train.value(name)[seen], color=COLOURS[0], linewidth=1.1, marker="o" if seen.sum() == 1 else "")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15 * np.nanmax(train.value(name)) or 1.0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    return _finish(figure, run, narrow, tasks=False)


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
        "The factor of each task in the loss, step by step: above the dashed line 1/K a task is pushed, below it is held back.",
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
)


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a fortieth of the points, over fewer at both ends."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _any(run: Run, series: Series, name: str) -> bool:
    return any(np.isfinite(series.of_task(task, name)).any() for task in run.tasks)


def _canvas(run: Run, narrow: bool, panels: int = 1, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """Empty axes over one another with a common step axis. `height`: inches of one panel."""
    width = 4.0 if narrow else 7.6
    height = height or (3.0 if narrow else 3.7) * (1.0 if panels == 1 else 0.55)
    figure = Figure(figsize=(width, height * panels + 0.5), layout="constrained", facecolor="white")
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    last = run.metrics.last_step
    for axes in grid:
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(labelsize=_points(narrow), color="#999999")
        axes.yaxis.get_offset_text().set_size(_points(narrow))
        axes.yaxis.label.set_size(_points(narrow))
        axes.xaxis.label.set_size(_points(narrow))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if narrow else 8, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.set_xlim(0, max(last, 1) * 1.02)
    grid[-1].set_xlabel("optimizer step")
    return figure, list(grid)


def _points(narrow: bool) -> float:
    return 8.5 if narrow else 10.0


def _line(axes: Axes, run: Run, task: str, steps: NDArray, values: NDArray, faint: bool = False, marker: str = "") -> None:
    seen = np.isfinite(values)
    if not seen.any():
        return
    colour, dashes = style_of(run.tasks, task)
    if faint:
        axes.plot(steps[seen], values[seen], color=colour, linewidth=0.6, alpha=0.22 if len(run.tasks) <= 5 else 0.13, zorder=1.5)
    else:
        marker = marker or ("o" if seen.sum() == 1 else "")
        axes.plot(steps[seen], values[seen], color=colour, linewidth=1.7, dashes=dashes or (None, None), marker=marker, markersize=3.5, zorder=2.5)


def _mark(axes: Axes, step: float, label: str, dashes: tuple[float, float] = (1, 2)) -> None:
    """A named upright line; the name stands above the axes, where no data is."""
    axes.axvline(step, color=GREY, linewidth=1.1, dashes=dashes, zorder=2)
    share = step / axes.get_xlim()[1]
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        label, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha=side, color="#444444", fontsize=8.5
    )


def _mark_warmup(axes: Axes, run: Run, named: bool = True) -> None:
    """Where CoBa's warm-up ends; W is in observations."""
    observations = run.setting("balancer.warmup")
    if run.setting("balancer.kind") != "coba" or not isinstance(observations, int):
        return
    step = observations * (run.setting("balancer.update_interval") or 1)
    if step <= run.metrics.last_step:
        _mark(axes, step, "warm-up ends" if named else "")


def _limit(axes: Axes, low: float, high: float) -> None:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)


def _finish(figure: Figure, run: Run, narrow: bool, extra: list[Line2D] | None = None, tasks: bool = True) -> Figure:
    """Adds the legend below the axes, where it covers nothing, in as many columns as fit; the figure grows with its rows."""
    figure.align_ylabels()
    handles = list(extra or [])
    if tasks:
        for task in reversed(run.tasks):
            colour, dashes = style_of(run.tasks, task)
            label = _shortened(task, 26 if narrow else 40)
            handles.insert(0, Line2D([], [], color=colour, linewidth=1.9, dashes=dashes or (None, None), label=label))
    if handles:
        inches_of_entry = 0.55 + max(len(str(handle.get_label())) for handle in handles) * _points(narrow) * 0.62 / 72
        columns = min(max(int(figure.get_figwidth() / inches_of_entry), 1), len(handles))
        rows = -(-len(handles) // columns)
        columns = -(-len(handles) // rows)  # as few as these rows need: even columns
        figure.set_figheight(figure.get_figheight() + rows * _points(narrow) * 1.6 / 72)
        figure.legend(handles=handles, loc="outside lower center", ncol=columns, frameon=False, fontsize=_points(narrow), handlelength=2.4)
    return figure


def _shortened(name: str, length: int) -> str:
    """Names may be long; their ends are what tells them apart."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"
