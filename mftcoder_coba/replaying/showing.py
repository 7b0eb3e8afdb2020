"""What a replay has to show: a table and sentences, weights.csv, and figures of the weights."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mftcoder_coba.config import CobaConfig
from mftcoder_coba.replaying.feeding import MARGIN, Replay, Span, equals_recorded, held_back, warmup_end
from mftcoder_coba.reporting.figures import DPI, GREY, is_noisy, running_mean, style_of

SPANS_TOLD = 4
PANELS = 12  # of one figure


def lines(replays: Sequence[Replay]) -> list[str]:
    """A table and the held-back spans of each replay, as text."""
    recording = replays[0].recording
    count, steps = len(recording.tasks), recording.steps
    head = [
        f"{recording.source}: {len(steps)} observations in steps {steps[0]}-{steps[-1]}, {count} tasks, 1/K = {1 / count:.3f}",
        "Weights are those after the observation of a step; the next step would train with them. The losses stay those recorded.",
        f"Held back: below 1/K by more than {MARGIN:.0%} of it.",
    ]
    return head + [line for replay in replays for line in ["", *_lines_of(replay)]]


def _lines_of(replay: Replay) -> list[str]:
    config = replay.config
    found = {"window": "window", "warmup": "warm-up"}
    facts = [f"{words} {getattr(config, name)}" for name, words in found.items() if getattr(replay.variant.config, name, None) == "auto"]
    if isinstance(config, CobaConfig) and replay.observed < len(replay.steps):
        facts.append(f"{replay.observed} of the observations taken")
    result = [": ".join([replay.variant.label, *([", ".join(facts)] if facts else [])])]
    match equals_recorded(replay):
        case True:
            result.append("  equal to the weights that the run recorded, bit for bit")
        case False:
            result.append("  NOT equal to the weights that the run recorded: it was resumed with other settings, or by another version")
    if isinstance(config, CobaConfig) and warmup_end(replay) is None:
        result.append(f"  the warm-up takes {config.warmup} observations and there are {replay.observed}: every weight stays 1/K")
    width = max(4, *map(len, replay.tasks))
    result.append(f"  {'task':<{width}}   final   lowest at step   highest at step")
    for column, task in enumerate(replay.tasks):
        weights = replay.weights[:, column]
        low, high = int(weights.argmin()), int(weights.argmax())
        ends = f"{weights[low]:.3f} {replay.steps[low]:>7}   {weights[high]:>7.3f} {replay.steps[high]:>7}"
        result.append(f"  {task:<{width}}   {weights[-1]:.3f}   {ends}")
    return result + [f"  {task}: {_told(replay, column)}" for column, task in enumerate(replay.tasks)]


def _told(replay: Replay, column: int) -> str:
    """The longest spans of one task, in their order."""
    spans = held_back(replay.steps, replay.weights[:, column], len(replay.tasks))
    if not spans:
        return "never held back"
    longest = sorted(sorted(spans, key=lambda span: span.first - span.last)[:SPANS_TOLD], key=lambda span: span.first)
    told = "; ".join(f"{_steps(span)} (lowest {span.lowest:.2g} at {span.lowest_step})" for span in longest)
    more = len(spans) - len(longest)
    total = sum(span.observations for span in spans)
    return f"held back in {told}" + (f"; and {more} shorter spans" if more else "") + f"; {total} of {len(replay.steps)} observations"


def _steps(span: Span) -> str:
    return f"steps {span.first}-{span.last}" if span.last > span.first else f"step {span.first}"


def write_csv(replays: Sequence[Replay], file: Path) -> Path:
    """Columns step, balancer, and a weight per task, written so that reading gives the same bits."""
    with file.open("w", encoding="utf-8", newline="") as output:
        writer = csv.writer(output, lineterminator="\n")
        writer.writerow(["step", "balancer", *replays[0].tasks])
        for replay in replays:
            for step, row in zip(replay.steps.tolist(), replay.weights.tolist(), strict=True):
                writer.writerow([step, replay.variant.label, *map(repr, row)])
    return file


def write_figures(replays: Sequence[Replay], folder: Path) -> list[Path]:
    """weights.png, and weights-2.png, ... where there are more replays than panels. Figures of an earlier replay go."""
    for old in [folder / "weights.png", *folder.glob("weights-[0-9]*.png")]:
        old.unlink(missing_ok=True)
    noisy = any(is_noisy(column) for replay in replays for column in replay.weights.T)
    # Single spikes must not press the lines flat.
    highest = max(float(max(_strong(replay, noisy).max(), np.percentile(replay.weights, 99 if noisy else 100))) for replay in replays)
    files = []
    for start in range(0, len(replays), PANELS):
        file = folder / ("weights.png" if start == 0 else f"weights-{start // PANELS + 1}.png")
        draw(replays[start : start + PANELS], highest, noisy).savefig(file, dpi=DPI)
        files.append(file)
    return files


def draw(replays: Sequence[Replay], highest: float, noisy: bool) -> Figure:
    """One panel per replay, all on the same axes up to the weight `highest`. `noisy`: running means, and faint lines of the weights."""
    columns = 1 if len(replays) <= 2 else 2 if len(replays) <= 8 else 3
    rows = -(-len(replays) // columns)
    width, height = (7.6, 10.5, 13.5)[columns - 1], 3.0 if columns == 1 else 2.5
    handles = _handles(replays, noisy)
    entry = 0.6 + max(len(str(handle.get_label())) for handle in handles) * 0.085  # inches
    per_row = min(max(int(width / entry), 1), len(handles))
    legend_rows = -(-len(handles) // per_row)
    figure = Figure(figsize=(width, height * rows + 0.4 + 0.22 * legend_rows), layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, replay in zip(panels, replays, strict=False):
        _draw_panel(axes, replay, noisy)
        axes.set_ylim(0, 1.1 * highest)
    for axes in panels[len(replays) :]:
        axes.set_visible(False)
    for number, axes in enumerate(panels[: len(replays)]):
        if number % columns == 0:
            axes.set_ylabel("weight")
        if number + columns >= len(replays):  # nothing below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("optimizer step")
    figure.legend(handles=handles, loc="outside lower center", ncol=-(-len(handles) // legend_rows), frameon=False, fontsize=10, handlelength=2.4)
    return figure


def _handles(replays: Sequence[Replay], noisy: bool) -> list[Line2D]:
    tasks = list(replays[0].tasks)
    handles = [Line2D([], [], color=colour, linewidth=1.9, dashes=dashes or (None, None), label=task) for task, colour, dashes in _styles(tasks)]
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, dashes=(4, 3), label=f"1/K = {1 / len(tasks):.3g}"))
    if any(warmup_end(replay) is not None for replay in replays):
        handles.append(Line2D([], [], color=GREY, linewidth=1.1, dashes=(1, 2), label="warm-up ends"))
    if noisy:
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, alpha=0.5, label="faint: single steps"))
    return handles


def _draw_panel(axes: Axes, replay: Replay, noisy: bool) -> None:
    strong = _strong(replay, noisy)
    for column, (_, colour, dashes) in enumerate(_styles(list(replay.tasks))):
        if noisy:
            axes.plot(replay.steps, replay.weights[:, column], color=colour, linewidth=0.6, alpha=0.18, zorder=1.5)
        marker = "o" if len(replay.steps) == 1 else ""
        axes.plot(replay.steps, strong[:, column], color=colour, linewidth=1.6, dashes=dashes or (None, None), marker=marker, zorder=2.5)
    axes.axhline(1 / len(replay.tasks), color=GREY, linewidth=0.9, dashes=(4, 3))
    end = warmup_end(replay)
    if end is not None:
        axes.axvline(end, color=GREY, linewidth=1.1, dashes=(1, 2))
    axes.set_title(replay.variant.label, fontsize=10, loc="left", wrap=True)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(color="#999999")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlim(0, int(replay.steps[-1]) * 1.02)


def _strong(replay: Replay, noisy: bool) -> NDArray:
    """[n, K] what the strong lines show."""
    return np.stack([running_mean(column) for column in replay.weights.T], axis=1) if noisy else replay.weights


def _styles(tasks: list[str]) -> list[tuple[str, str, tuple[float, ...]]]:
    return [(task, *style_of(tasks, task)) for task in tasks]
