"""What all figures have in common: styles, the sheet that a figure is drawn on, and its PNG.

`run_figures` draws one run, `comparison_figures` several. Every figure can be drawn `narrow`, for a phone: smaller, with
letters that stay legible there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow (too pale for a line).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
# Past the seventh line the colours return with another line style.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
GREY = "#666666"
DPI = 150
# Values are noisy, and drawn as a running mean, when the way they go up and down is so many times their extent.
NOISY = 8.0
# So many points and more can have single wild ones, which must not press all others flat.
MANY_POINTS = 50


@dataclass(frozen=True)
class Chart:
    """A figure of the report: file name without suffix, title, a sentence on how to read it, and what draws it: a Figure, or
    None where there is nothing to show."""

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure | None]


def style_of(names: Sequence[str], name: str) -> tuple[str, tuple[float, ...]]:
    """Colour and dash pattern (in line widths) of one of `names`."""
    number = list(names).index(name)
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


class Sheet:
    """A figure that is being drawn: one or more axes over optimizer steps, whose lines stand for `names` in all of them.

    Args:
        names: of tasks or runs; they are the legend.
        last_step: where the step axes end.
        order: all names of the page; a name's place there is its style. None: `names`.
    """

    def __init__(self, names: Sequence[str], last_step: int, narrow: bool, order: Sequence[str] | None = None):
        self.names, self.last_step, self.narrow = list(names), last_step, narrow
        self.styles = {name: style_of(order or self.names, name) for name in self.names}
        self.points = 8.5 if narrow else 10.0  # of letters
        self.figure = Figure(dpi=DPI, layout="constrained", facecolor="white")

    def panels(self, count: int = 1, columns: int = 1, height: float | None = None) -> list[Axes]:
        """`count` axes, row by row; in one column they share the steps, in several also the values.

        Args:
            height: inches of one panel.
        """
        height = height or (3.0 if self.narrow else 3.7) * (1.0 if count == 1 else 0.55)
        rows = -(-count // columns)
        width = 4.0 if self.narrow else 7.6 if columns == 1 else 10.5
        self.figure.set_size_inches(width, height * rows + 0.5)
        grid = self.figure.subplots(rows, columns, sharex=True, sharey=columns > 1, squeeze=False)
        ticks = max((5 if self.narrow else 8) // columns, 3)
        for axes in grid.flat:
            self._prepare(axes, ticks)
        drawn, unused = list(grid.flat)[:count], list(grid.flat)[count:]
        for axes in unused:
            axes.set_visible(False)
        for axes in drawn[-columns:]:  # nothing below them
            axes.set_xlabel("optimizer step")
            axes.tick_params(labelbottom=True)
        return drawn

    def _prepare(self, axes: Axes, ticks: int) -> None:
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(labelsize=self.points, color="#999999")
        for text in (axes.yaxis.get_offset_text(), axes.yaxis.label, axes.xaxis.label):
            text.set_size(self.points)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.set_xlim(0, max(self.last_step, 1) * 1.02)

    def line(self, axes: Axes, name: str, steps: NDArray, values: NDArray, faint: bool = False, marker: str = "") -> None:
        """The finite values, joined. One that stands alone gets a marker, or nobody would see it."""
        seen = np.isfinite(values)
        if not seen.any():
            return
        colour, dashes = self.styles[name]
        if faint:
            axes.plot(steps[seen], values[seen], color=colour, linewidth=0.6, alpha=0.22 if len(self.names) <= 5 else 0.13, zorder=1.5)
        else:
            marker = marker or ("o" if seen.sum() == 1 else "")
            axes.plot(
                steps[seen], values[seen], color=colour, linewidth=1.7, dashes=dashes or (None, None), marker=marker, markersize=3.5, zorder=2.5
            )

    def smooth_line(self, axes: Axes, name: str, steps: NDArray, values: NDArray) -> None:
        """The running mean over a faint line of the values themselves."""
        seen = np.isfinite(values)
        self.line(axes, name, steps[seen], values[seen], faint=True)
        self.line(axes, name, steps[seen], running_mean(values[seen]))

    def plain_line(self, axes: Axes, steps: NDArray, values: NDArray, colour: str = "black") -> None:
        """A line that stands for no name, such as a value of the whole run."""
        seen = np.isfinite(values)
        axes.plot(steps[seen], values[seen], color=colour, linewidth=1.4, marker="o" if seen.sum() == 1 else "", markersize=3.5)

    def level(self, axes: Axes, value: float) -> None:
        """A dashed line across, such as 1/K."""
        axes.axhline(value, color=GREY, linewidth=0.9, dashes=(4, 3))

    def mark(self, axes: Axes, step: float, label: str) -> None:
        """A named upright line; the name stands above the axes, where no data is."""
        axes.axvline(step, color=GREY, linewidth=1.1, dashes=(1, 2), zorder=2)
        share = step / axes.get_xlim()[1]
        side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(label, (step, 1.0), ha=side, color="#444444", fontsize=8.5, **place)

    def title(self, axes: Axes, name: str, columns: int) -> None:
        axes.set_title(shortened(name, (44 if self.narrow else 80) // columns), fontsize=self.points, loc="left")

    def finish(self, extra: Iterable[Line2D] = (), legend: bool = True) -> Figure:
        """Adds the legend below the axes, where it covers nothing, in as many columns as fit; the figure grows with its rows."""
        self.figure.align_ylabels()
        handles = [
            Line2D([], [], color=colour, linewidth=1.9, dashes=dashes or (None, None), label=shortened(name, 26 if self.narrow else 40))
            for name, (colour, dashes) in (self.styles.items() if legend else ())
        ] + list(extra)
        if handles:
            inches_of_entry = 0.55 + max(len(str(handle.get_label())) for handle in handles) * self.points * 0.62 / 72
            columns = min(max(int(self.figure.get_figwidth() / inches_of_entry), 1), len(handles))
            rows = -(-len(handles) // columns)
            columns = -(-len(handles) // rows)  # as few as these rows need: even columns
            self.figure.set_figheight(self.figure.get_figheight() + rows * self.points * 1.6 / 72)
            self.figure.legend(handles=handles, loc="outside lower center", ncol=columns, frameon=False, fontsize=self.points, handlelength=2.4)
        return self.figure


def dashed_entry(label: str) -> Line2D:
    """The legend's entry of `Sheet.level`."""
    return Line2D([], [], color=GREY, linewidth=0.9, dashes=(4, 3), label=label)


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a fortieth of the points, over fewer at both ends."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def is_noisy(values: NDArray[np.float64]) -> bool:
    """Whether the values jump so much that only their running mean can be read."""
    finite = values[np.isfinite(values)]
    return len(finite) >= MANY_POINTS and bool(np.abs(np.diff(finite)).sum() > NOISY * np.ptp(finite))


def extent(columns: Iterable[NDArray[np.float64]], wild: float = 1.0) -> tuple[float, float]:
    """From where to where the finite values reach, without the `wild` percent at either end of a long column. Some value must
    be finite."""
    lows, highs = [], []
    for values in columns:
        finite = values[np.isfinite(values)]
        if len(finite):
            cut = wild if len(finite) >= MANY_POINTS else 0.0
            lows.append(np.percentile(finite, cut))
            highs.append(np.percentile(finite, 100 - cut))
    return float(min(lows)), float(max(highs))


def limit(axes: Axes, low: float, high: float) -> None:
    """Value axis from `low` to `high`, with a margin."""
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + margin)


def shortened(name: str, length: int) -> str:
    """Names may be long; their ends are what tells them apart."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # draws once: `savefig` would draw twice for the layout, to the same pixels
    return buffer.getvalue()
