"""The figures of a comparison: a panel a method, a line a task; lines are means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mftcoder_coba.comparing.curves import Curves, curves_of, normalised
from mftcoder_coba.comparing.methods import folder_name
from mftcoder_coba.comparing.results import Outcome
from mftcoder_coba.reporting.figures import GREY, Chart, Sheet, dashed_entry, extent, is_noisy, limit, png
from mftcoder_coba.reporting.run_figures import coba_scores

LEVEL = (4, 3)  # dashes of a line across
SELECTED = Line2D([], [], color=GREY, linewidth=1.1, dashes=(1, 2), label="selected checkpoint, of each seed")


def charts_of(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[Chart]:
    """What there is to draw, in the order of the page."""
    curves, last = curves_of(outcomes, tasks), max((outcome.run.metrics.last_step for outcome in outcomes), default=0)
    mixtures = [of for of in curves if not of.single]
    charts = [
        Chart(
            "normalised_ratio",
            "Validation ratio per task, normalised",
            "Each task's validation ratio, scaled to run from 0 (its own minimum, the dot) to 1 (its maximum) over the run. Tasks converge together "
            "where the dots stand close; at the dotted lines the checkpoint is selected, and a task that has its dot before it and rises "
            "is overfitted there. A run of a single task is drawn over the steps in which the mixture makes as many passes over the task.",
            lambda narrow=False: normalised_ratio(curves, tasks, last, narrow),
        ),
        Chart(
            "mean_ratio",
            "Mean validation ratio",
            "Mean over tasks of the validation ratio; below, the same lines near their lowest. "
            "A dashed level line is every task by a model of its own, each at its best checkpoint.",
            lambda narrow=False: mean_ratio(curves, last, narrow),
        ),
        Chart(
            "weights",
            "Task weights",
            "The factor of each task in the loss: above the dashed line 1/K a task is pushed, below it is held back. "
            "Where weights jump, strong lines are running means.",
            lambda narrow=False: weights(mixtures, tasks, last, narrow),
        ),
    ]
    return charts + [_coba_chart(outcome, tasks) for outcome in _first_of_coba(outcomes)]


def draw(charts: Sequence[Chart], folder: Path) -> list[dict[str, object]]:
    """Writes NAME.png of every chart, and gives each in two widths for the page. Figures of an earlier call go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    drawn: list[dict[str, object]] = []
    for chart in charts:
        figure = chart.draw()
        if figure is not None:
            wide, narrow = png(figure), png(chart.draw(narrow=True))
            (folder / f"{chart.name}.png").write_bytes(wide)
            drawn.append({"chart": chart, "wide": wide, "narrow": narrow})
    return drawn


def normalised_ratio(curves: Sequence[Curves], tasks: Sequence[str], last: int, narrow: bool) -> Figure | None:
    """In the manner of the figures of arXiv 2410.06741."""
    shown = [of for of in curves if any(len(values) > 1 for _, values in of.ratio.values())]
    if not shown:
        return None
    sheet, columns = Sheet(tasks, last, narrow), _columns(len(shown), narrow)
    panels = sheet.panels(len(shown), columns, height=1.9 if narrow else 2.4)
    for number, (axes, of) in enumerate(zip(panels, shown, strict=True)):
        lowest: list[float] = []
        for task, (steps, ratio) in of.ratio.items():
            sheet.line(axes, task, steps, normalised(ratio))
            lowest.append(float(steps[ratio.argmin()]))
        for place, (task, step) in enumerate(zip(of.ratio, lowest, strict=True)):
            size = 5 + 2.5 * lowest[place + 1 :].count(step)  # dots of one step lie in one another
            axes.plot(step, 0.0, "o", color=sheet.styles[task][0], markersize=size, zorder=3, clip_on=False)
        for step in of.selected:
            sheet.mark(axes, step, "")
        sheet.title(axes, of.method, columns)
        axes.set_ylim(-0.06, 1.06)
        if number % columns == 0:
            axes.set_ylabel("scaled ratio")
    return sheet.finish([Line2D([], [], color=GREY, linestyle="", marker="o", markersize=5, label="lowest of the task"), SELECTED])


def mean_ratio(curves: Sequence[Curves], last: int, narrow: bool) -> Figure | None:
    shown = {of.method: of.mean_ratio for of in curves if of.mean_ratio is not None and len(of.mean_ratio[0])}
    singles = {of.method: of.best for of in curves if of.single and np.isfinite(of.best)}
    if not shown:
        return None
    sheet = Sheet([*shown, *singles], last, narrow)
    sheet.styles |= {method: (sheet.styles[method][0], LEVEL) for method in singles}
    panels = sheet.panels(2, height=2.4 if narrow else 3.0)
    for axes in panels:
        for method, (steps, values) in shown.items():
            sheet.line(axes, method, steps, values)
        for method, value in singles.items():
            axes.axhline(value, color=sheet.styles[method][0], linewidth=1.1, dashes=LEVEL)
        axes.set_ylabel("mean validation ratio")
    # Minima and ends are where methods differ; what comes before them would press that flat.
    low, high = extent([np.array([value for _, values in shown.values() for value in (values.min(), values[-1])])])
    limit(panels[1], low - 0.1 * (high - low), high + 0.3 * (high - low))
    return sheet.finish()


def weights(curves: Sequence[Curves], tasks: Sequence[str], last: int, narrow: bool) -> Figure | None:
    shown = [of for of in curves if of.weights]
    if not shown:
        return None
    sheet, columns, equal = Sheet(tasks, last, narrow), _columns(len(shown), narrow), 1 / len(tasks)
    panels = sheet.panels(len(shown), columns, height=1.9 if narrow else 2.4)
    highest = equal
    for number, (axes, of) in enumerate(zip(panels, shown, strict=True)):
        noisy = any(is_noisy(values) for _, values in of.weights.values())
        for task, (steps, values) in of.weights.items():
            (sheet.smooth_line if noisy else sheet.line)(axes, task, steps, values)
            highest = max(highest, extent([values], wild=5.0 if noisy else 0.0)[1])
        sheet.level(axes, equal)
        sheet.title(axes, of.method, columns)
        if number % columns == 0:
            axes.set_ylabel("weight")
    for axes in panels:
        axes.set_ylim(0, 1.1 * highest)
    return sheet.finish([dashed_entry(f"1/K = {equal:.3g}")])


def _coba_chart(outcome: Outcome, tasks: Sequence[str]) -> Chart:
    return Chart(
        f"coba_scores-{folder_name(outcome.method)}",
        f"RCS, ACS and DF of {outcome.method}, seed {outcome.seed}",
        "The weights are DF x RCS + (1 - DF) x ACS: RCS favours the task that converges slowest among all, ACS the task that still improves compared "
        "with its own past, and DF falls from 1 when some task begins to diverge.",
        lambda narrow=False: coba_scores(outcome.run, narrow, tasks),
    )


def _first_of_coba(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first seed's run of every method that is a CoBa."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.task is None and outcome.run.setting("balancer.kind") == "coba":
            first.setdefault(outcome.method, outcome)
    return list(first.values())


def _columns(panels: int, narrow: bool) -> int:
    most = 2 if narrow else 4 if panels > 9 else 3
    return min(most, panels)
