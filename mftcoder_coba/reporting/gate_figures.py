"""The figures of a run whose adapter has experts: how much of each its tasks' gates let through, and how that went."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mftcoder_coba.reporting.figures import Sheet, dashed_entry, extent, limit, shortened
from mftcoder_coba.reporting.gates import Gates
from mftcoder_coba.reporting.layer_grid import Grid
from mftcoder_coba.reporting.records import Run
from mftcoder_coba.reporting.summary import gates_at_best

# The heat map has room for so many tasks: those whose gates are furthest from even are shown.
SHOWN_TASKS = 12
COLOUR_MAP = "RdBu_r"  # the colour-blind can tell its two ends apart
# The colours reach to this factor above and below an even gate at least: smaller movements stay pale.
LEAST_FACTOR = 1.1
# So many percent of the values are within the colours, the others have those of the ends.
WITHIN = 99.0
LOWEST_GATE = 1e-6  # a gate of 0 has no logarithm
BAND_INCHES = (0.19, 0.36)  # height of an expert's band: of one row, and of many
PANEL_INCHES = 4.5  # height of all bands of a task, at most


def expert_gates(run: Run, narrow: bool = False, order: Sequence[str] | None = None) -> Figure | None:
    """A panel for each task: layers from left to right, a band for each expert, in it a row for each kind of linear layer."""
    gates = gates_at_best(run)
    tasks = [task for task in run.tasks if task in gates.values and len(gates.experts[task]) > 1] if gates else []
    if not tasks:
        return None
    shown, grid = _most_uneven(gates, tasks), Grid.of(gates.layers)
    maps = {task: grid.spread(_log_factors(gates, task)) for task in shown}
    counts = {len(gates.experts[task]) for task in shown}
    colours = ScalarMappable(_colour_range(maps, max(counts)), COLOUR_MAP)
    sheet = Sheet(shown, run.metrics.last_step, narrow, order)
    columns = 1 if narrow else min(len(shown), 3) if len(shown) != 4 else 2
    panels = _panels(sheet, columns, len(grid.kinds), max(counts))
    for number, (axes, task) in enumerate(zip(panels, shown, strict=True)):
        _draw_map(axes, colours, maps[task], gates.common(task))
        _name_depths(sheet, axes, grid)
        first, names = shown[number - number % columns], _expert_names(gates, task)
        _name_experts(sheet, axes, names if task == first or names != _expert_names(gates, first) else [], len(grid.kinds))
        axes.set_title(_title(gates, task, tasks, 42 if narrow else 108 // columns), fontsize=sheet.points, loc="left")
    for axes in panels[-columns:]:
        axes.set_xlabel("layer", fontsize=sheet.points)
    _colour_bar(sheet, colours, panels, counts)
    _note(sheet, grid, gates.step, len(tasks) - len(shown))
    return sheet.figure


def common_share(run: Run, narrow: bool = False, order: Sequence[str] | None = None) -> Figure | None:
    """One line for each task that has both kinds of experts."""
    tasks = [task for task in run.tasks if any(task in gates.values and gates.has_both_kinds(task) for gates in run.metrics.gates)]
    steps = np.array([gates.step for gates in run.metrics.gates])
    curves = {task: np.array([gates.common_share(task) if task in gates.values else np.nan for gates in run.metrics.gates]) for task in tasks}
    if not any(np.isfinite(values).any() for values in curves.values()):
        return None
    even = {gates.even_common_share(task) for gates in run.metrics.gates for task in tasks if task in gates.values}
    sheet = Sheet(tasks, run.metrics.last_step, narrow, order or run.tasks)
    (axes,) = sheet.panels()
    for task, values in curves.items():
        sheet.line(axes, task, steps, values, marker="o")
    for value in even:
        sheet.level(axes, value)
    limit(axes, *extent([*curves.values(), np.array(list(even))], wild=0.0))
    axes.set_ylabel("gate of common experts")
    named = f"even: {min(even):.3g}" if len(even) == 1 else "even"
    return sheet.finish([dashed_entry(named)])


def _most_uneven(gates: Gates, tasks: Sequence[str]) -> list[str]:
    """As many tasks as there is room for; those of a cluster stand together."""
    distance = {task: np.abs(np.nan_to_num(_log_factors(gates, task))).mean() for task in tasks}
    chosen = sorted(tasks, key=lambda task: -distance[task])[:SHOWN_TASKS]
    clusters = list(dict.fromkeys(gates.cluster(task) for task in tasks))
    return sorted((task for task in tasks if task in chosen), key=lambda task: clusters.index(gates.cluster(task)))


def _log_factors(gates: Gates, task: str) -> NDArray[np.float64]:
    """Logarithm of what a gate is compared with an even one; [layers, experts]."""
    return np.log(np.maximum(gates.values[task], LOWEST_GATE) * len(gates.experts[task]))


def _colour_range(maps: dict[str, NDArray[np.float64]], experts: int) -> Normalize:
    """The same factor up and down, so that white is an even gate; no higher than a gate of 1."""
    distances = np.abs(np.concatenate([values.ravel() for values in maps.values()]))
    finite = distances[np.isfinite(distances)]
    reach = float(np.percentile(finite, WITHIN)) if len(finite) else 0.0
    reach = min(max(reach, np.log(LEAST_FACTOR)), np.log(experts))
    return Normalize(-reach, reach)


def _panels(sheet: Sheet, columns: int, kinds: int, experts: int) -> list[Axes]:
    lowest, highest = BAND_INCHES
    height = min(max(lowest, min(0.05 * kinds, highest)) * experts, PANEL_INCHES)
    rows = -(-len(sheet.names) // columns)
    sheet.figure.set_size_inches(4.0 if sheet.narrow else 10.5, (height + 0.45) * rows + 1.3)
    grid = sheet.figure.subplots(rows, columns, squeeze=False)
    for axes in list(grid.flat)[len(sheet.names) :]:
        axes.set_visible(False)
    return list(grid.flat)[: len(sheet.names)]


def _draw_map(axes: Axes, colours: ScalarMappable, values: NDArray[np.float64], common: int) -> None:
    """`values` [experts, kinds, depths]; thin lines between the experts, a strong one between common ones and the task's own."""
    experts, kinds, depths = values.shape
    axes.set_facecolor("#999999")  # where the model has no layer
    axes.imshow(
        values.reshape(experts * kinds, depths), cmap=colours.get_cmap(), norm=colours.norm, aspect="auto", interpolation="nearest", origin="upper"
    )
    for expert in range(1, experts):
        axes.axhline(expert * kinds - 0.5, color="black", linewidth=1.8 if expert == common else 0.5)


def _name_depths(sheet: Sheet, axes: Axes, grid: Grid) -> None:
    ticks = MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True).tick_values(0, len(grid.depths) - 1)
    places = [int(tick) for tick in ticks if 0 <= tick < len(grid.depths)]
    axes.set_xticks(places, [str(grid.depths[place]) for place in places])
    axes.tick_params(labelsize=sheet.points, color="#999999")


def _name_experts(sheet: Sheet, axes: Axes, names: Sequence[str], kinds: int) -> None:
    """A name at the middle of its band; not all of them where they have no room."""
    places = range(0, len(names), max(math.ceil(len(names) * sheet.points / 72 / PANEL_INCHES), 1))
    axes.set_yticks([(place + 0.5) * kinds - 0.5 for place in places], [names[place] for place in places])
    axes.tick_params(axis="y", length=0, labelsize=sheet.points)


def _expert_names(gates: Gates, task: str) -> list[str]:
    common, count = gates.common(task), len(gates.experts[task])
    if common == count:
        return [f"expert {number + 1}" for number in range(count)]
    return [f"common {number + 1}" if number < common else f"own {number - common + 1}" for number in range(count)]


def _title(gates: Gates, task: str, tasks: Sequence[str], length: int) -> str:
    """With the cluster, where there is more than one."""
    cluster = gates.cluster(task) if len({gates.cluster(other) for other in tasks}) > 1 else ""
    return f"{shortened(task, 2 * length // 3 - 3)} ({shortened(cluster, length // 3)})" if cluster else shortened(task, length)


def _colour_bar(sheet: Sheet, colours: ScalarMappable, panels: Sequence[Axes], counts: set[int]) -> None:
    """With the gates' true values; with factors where not all tasks see as many experts."""
    width, height = sheet.figure.get_size_inches()
    shrink, inches = (0.9, 0.1) if sheet.narrow else (0.5, 0.12)
    place = {"location": "top", "shrink": shrink, "aspect": shrink * width / inches, "fraction": inches / height, "pad": inches / height}
    reach = colours.norm.vmax
    whole = reach >= np.log(max(counts))  # nothing is above
    bar = sheet.figure.colorbar(colours, ax=panels, extend="min" if whole else "both", **place)
    places = np.linspace(-reach, reach, 5)
    factors = np.exp(places)
    if len(counts) == 1:
        (count,) = counts
        bar.set_ticks(places, labels=[f"{factor / count:.3g}" for factor in factors])
        bar.set_label(f"gate (white: even, 1/{count})", fontsize=sheet.points)
    else:
        bar.set_ticks(places, labels=[f"{factor:.2f}" for factor in factors])
        bar.set_label("gate over an even one (white: even)", fontsize=sheet.points)
    bar.ax.tick_params(labelsize=sheet.points)


def _note(sheet: Sheet, grid: Grid, step: int, hidden: int) -> None:
    """Below the panels, what the axes cannot say."""
    texts = [f"Step {step}."]
    if len(grid.kinds) > 1:
        texts.append(f"The rows of an expert, from the top: {', '.join(grid.kinds)}.")
    if hidden:
        texts.append(f"Not shown: {hidden} {'task' if hidden == 1 else 'tasks'} whose gates are closer to even.")
    characters = int(sheet.figure.get_figwidth() * 72 / (0.52 * sheet.points))
    text = textwrap.fill(" ".join(texts), characters)
    sheet.figure.supxlabel(text, x=0.01, ha="left", fontsize=sheet.points, color="#444444")
