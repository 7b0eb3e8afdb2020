"""The tables of a comparison before their rows: which columns, of what, with how many digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mftcoder_coba.comparing.results import ALL, DEVIATION, MEAN, RANGE


@dataclass(frozen=True)
class Column:
    """A metric of a task, or of all.

    Attributes:
        decimals: of a mean of this size and its deviation.
        marked: less is better, and the least is marked.
        exact: a count that does not depend on the seed: shown in all its digits.
    """

    title: str
    metric: str
    task: str
    decimals: Callable[[float], int]
    marked: bool
    exact: bool = False


@dataclass(frozen=True)
class Layout:
    """A table before its rows. `notes`: what each column is, exactly."""

    name: str
    title: str
    columns: list[Column]
    notes: list[str]


def four(_: float) -> int:
    return 4


def two(_: float) -> int:
    return 2


def whole(_: float) -> int:
    return 0


def digits(value: float) -> int:
    """So many that four digits show in all."""
    return max(0, 3 - math.floor(math.log10(value))) if value > 0 else 3


MEAN_RATIO = Column("mean ratio", "ratio", MEAN, four, True)
RATIO = "ratio: full validation loss (mean over tokens) over that before training"


def per_task(tasks: Sequence[str], metric: str, decimals: Callable[[float], int], marked: bool = True) -> list[Column]:
    return [Column(task, metric, task, decimals, marked) for task in tasks]


def loss_layouts(tasks: Sequence[str], when: str) -> list[Layout]:
    """Ratio, loss and perplexity of each task and their mean. `when`: of which model they are."""
    mean = "mean: of the tasks' perplexities"
    return [
        Layout("ratio", "Validation ratio", [*per_task(tasks, "ratio", four), MEAN_RATIO], [f"{RATIO}, {when}"]),
        Layout(
            "loss", "Validation loss", [*per_task(tasks, "loss", four), Column("mean", "loss", MEAN, four, True)], [f"loss: nats a token, {when}"]
        ),
        Layout(
            "perplexity",
            "Validation perplexity",
            [*per_task(tasks, "perplexity", digits), Column("mean", "perplexity", MEAN, digits, True)],
            [f"perplexity: exp of the loss, {when}; {mean}"],
        ),
    ]


def comparison_layouts(tasks: Sequence[str], singles: str, reference: str, sizes: bool) -> list[Layout]:
    """Of a comparison. `sizes`: with the numbers of trained parameters."""
    selected = Column("selected step", "selected_step", ALL, whole, False)
    spread = Column("range of lowest steps", "lowest_step", RANGE, whole, True)
    time = Column("relative time", "relative_time", ALL, two, True)
    trained = Column("trained parameters", "trained_parameters", ALL, whole, False, exact=True)
    at_best = "at the selected checkpoint: the validation that is best by validation.early_stopping.criterion over the whole run"
    lowest = "lowest step of a task: the step of the validation after the start where its ratio is lowest, of equal ones the first"
    balance = "range: the largest minus the smallest lowest step of the tasks; small means that all converge together"
    seconds = (
        "seconds a step: median seconds of training steps, plus the median seconds of the balancer's observations times the part of the steps "
        "that have one; without validation, checkpoints and the start of the process"
    )
    relative = f"relative time: seconds a step over those of {reference} with the same seed"
    size = "trained parameters: of the model, or of the adapter" + (f"; {singles}: of the runs of all tasks together" if singles else "")
    own = [f"{singles}: each task from a run of its own, selected by its own ratio; not marked, for it is not one model but a model per task"]
    own_steps = [f"{singles}: steps of each task's own run; these are on no common scale and have no range"]
    ratio, *losses = loss_layouts(tasks, at_best)
    layouts = [
        Layout(
            "overview",
            "Overview",
            [MEAN_RATIO, *([trained] * sizes), selected, spread, time],
            [
                f"mean ratio: mean over tasks of the {RATIO}, {at_best}",
                *([size] * sizes),
                "selected step: the step of this checkpoint",
                f"{balance}; {lowest}",
                f"{relative}; {seconds}",
            ],
        ),
        replace(ratio, columns=[*ratio.columns, selected]),
        *losses,
        Layout(
            "lowest_ratio",
            "Lowest ratio at any validation",
            [*per_task(tasks, "lowest_ratio", four), Column("mean", "lowest_ratio", MEAN, four, True)],
            ["lowest ratio: of each task by itself, each at a step of its own; what one checkpoint loses against it is the price of sharing it"],
        ),
        Layout(
            "lowest_step",
            "Step where each task is at its lowest",
            [*per_task(tasks, "lowest_step", whole, False), spread, Column("deviation", "lowest_step", DEVIATION, whole, True)],
            [lowest, balance, "deviation: the standard deviation of the tasks' lowest steps (over all tasks, not a sample)"],
        ),
        Layout(
            "time",
            "Time",
            [Column("steps", "steps", ALL, whole, False), Column("seconds a step", "seconds_per_step", ALL, digits, True), time],
            [seconds, relative],
        ),
    ]
    if not singles:
        return layouts
    extra = {"lowest_step": own_steps, "time": [f"{singles}: the steps of all its runs together; every run uses the same global batch"]}
    return [replace(layout, notes=[*layout.notes, *extra.get(layout.name, own)]) for layout in layouts]
