"""Values -> tables: mean and standard deviation over seeds, the best of each column marked; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mftcoder_coba.comparing.results import ALL, DEVIATION, MEAN, RANGE, Value

ABSENT = "–"


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
class Cell:
    """`deviation`: over seeds, "" for one seed."""

    text: str
    deviation: str
    best: bool
    mean: float
    deviation_value: float


@dataclass(frozen=True)
class Row:
    """`note`: how many seeds are there, if not all."""

    method: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """`notes`: what each column is, exactly."""

    name: str
    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]


def build_tables(
    values: Sequence[Value],
    finished: Mapping[str, int],
    seeds: int,
    tasks: Sequence[str],
    singles: Sequence[str],
    reference: str = "uniform",
) -> list[Table]:
    """All tables; rows by mean ratio, the best first.

    Args:
        finished: method -> seeds whose runs are all finished.
        seeds: seeds of the comparison.
        singles: methods that train a model per task; what they come to is not of one model, and not marked.
        reference: the method that times are relative to.
    """
    samples: dict[tuple[str, str, str], list[float]] = {}
    for value in values:
        samples.setdefault((value.method, value.metric, value.task), []).append(value.value)

    def ratio(method: str) -> float:
        found = samples.get((method, "ratio", MEAN))
        return float(np.mean(found)) if found else np.inf

    order = sorted(finished, key=ratio)
    tables = []
    for name, title, columns, notes in _layouts(tasks, ", ".join(singles), reference, _sizes_differ(values)):
        cells = {column: _cells(column, order, samples, singles) for column in columns}
        rows = []
        for number, method in enumerate(order):
            note = "" if finished[method] == seeds else f"{finished[method]} of {seeds} seeds"
            rows.append(Row(method, note, [cells[column][number] for column in columns]))
        tables.append(Table(name, title, columns, rows, notes))
    return tables


def _sizes_differ(values: Sequence[Value]) -> bool:
    return len({value.value for value in values if value.metric == "trained_parameters"}) > 1


def _cells(column: Column, methods: Sequence[str], samples: Mapping[tuple[str, str, str], list[float]], singles: Sequence[str]) -> list[Cell]:
    cells, candidates = [], []
    for method in methods:
        found = samples.get((method, column.metric, column.task), [])
        mean = float(np.mean(found)) if found else math.nan
        deviation = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
        decimals = column.decimals(mean) if found else 0
        text = f"{mean:,.0f}" if found and column.exact else _text(mean, decimals) if found else ABSENT
        cells.append(Cell(text, _text(deviation, decimals) if len(found) > 1 and not column.exact else "", False, mean, deviation))
        if found and method not in singles:
            candidates.append((mean, text))
    if not column.marked or len(candidates) < 2:  # one number alone is not the best of any
        return cells
    least = min(candidates)[1]  # what reads the same is equally good
    return [replace(cell, best=cell.text == least and method not in singles) for cell, method in zip(cells, methods, strict=True)]


def _layouts(tasks: Sequence[str], singles: str, reference: str, sizes: bool) -> list[tuple[str, str, list[Column], list[str]]]:
    """(name, title, columns, notes) of each table. `sizes`: with the numbers of trained parameters."""

    def per_task(metric: str, decimals: Callable[[float], int], marked: bool = True) -> list[Column]:
        return [Column(task, metric, task, decimals, marked) for task in tasks]

    mean_ratio = Column("mean ratio", "ratio", MEAN, _four, True)
    selected = Column("selected step", "selected_step", ALL, _whole, False)
    spread = Column("range of lowest steps", "lowest_step", RANGE, _whole, True)
    time = Column("relative time", "relative_time", ALL, _two, True)
    trained = Column("trained parameters", "trained_parameters", ALL, _whole, False, exact=True)
    at_best = "at the selected checkpoint: the validation that is best by validation.early_stopping.criterion over the whole run"
    lowest = "lowest step of a task: the step of the validation after the start where its ratio is lowest, of equal ones the first"
    ratio = "ratio: full validation loss (mean over tokens) over that before training"
    balance = "range: the largest minus the smallest lowest step of the tasks; small means that all converge together"
    seconds = (
        "seconds a step: median seconds of training steps, plus the median seconds of the balancer's observations times the part of the steps "
        "that have one; without validation, checkpoints and the start of the process"
    )
    relative = f"relative time: seconds a step over those of {reference} with the same seed"
    size = "trained parameters: of the model, or of the adapter" + (f"; {singles}: of the runs of all tasks together" if singles else "")
    own = [f"{singles}: each task from a run of its own, selected by its own ratio; not marked, for it is not one model but a model per task"]
    own_steps = [f"{singles}: steps of each task's own run; these are on no common scale and have no range"]
    layouts = [
        (
            "overview",
            "Overview",
            [mean_ratio, *([trained] * sizes), selected, spread, time],
            [
                f"mean ratio: mean over tasks of the {ratio}, {at_best}",
                *([size] * sizes),
                "selected step: the step of this checkpoint",
                f"{balance}; {lowest}",
                f"{relative}; {seconds}",
            ],
        ),
        ("ratio", "Validation ratio", [*per_task("ratio", _four), mean_ratio, selected], [f"{ratio}, {at_best}"]),
        ("loss", "Validation loss", [*per_task("loss", _four), Column("mean", "loss", MEAN, _four, True)], [f"loss: nats a token, {at_best}"]),
        (
            "perplexity",
            "Validation perplexity",
            [*per_task("perplexity", _digits), Column("mean", "perplexity", MEAN, _digits, True)],
            [f"perplexity: exp of the loss, {at_best}; mean: of the tasks' perplexities"],
        ),
        (
            "lowest_ratio",
            "Lowest ratio at any validation",
            [*per_task("lowest_ratio", _four), Column("mean", "lowest_ratio", MEAN, _four, True)],
            ["lowest ratio: of each task by itself, each at a step of its own; what one checkpoint loses against it is the price of sharing it"],
        ),
        (
            "lowest_step",
            "Step where each task is at its lowest",
            [*per_task("lowest_step", _whole, False), spread, Column("deviation", "lowest_step", DEVIATION, _whole, True)],
            [lowest, balance, "deviation: the standard deviation of the tasks' lowest steps (over all tasks, not a sample)"],
        ),
        (
            "time",
            "Time",
            [Column("steps", "steps", ALL, _whole, False), Column("seconds a step", "seconds_per_step", ALL, _digits, True), time],
            [seconds, relative],
        ),
    ]
    if not singles:
        return layouts
    extra = {"lowest_step": own_steps, "time": [f"{singles}: the steps of all its runs together; every run uses the same global batch"]}
    return [(name, title, columns, [*notes, *extra.get(name, own)]) for name, title, columns, notes in layouts]


def seeds_note(seeds: int) -> str:
    if seeds == 1:
        return "One seed: differences may be chance."
    return f"Mean ± standard deviation (n - 1) over {seeds} seeds. Bold: the least mean of a column; it is not claimed to be significant."


def to_markdown(tables: Sequence[Table], head: Sequence[str], settings: Sequence[Sequence[str]] = ()) -> str:
    """`head`: lines above the tables. `settings`: the cells of a last table, row by row, header first."""
    parts = ["\n".join(head)]
    for table in tables:
        lines = [f"## {table.title}", "", _line(["method", *(column.title for column in table.columns)])]
        lines.append("|---|" + "---:|" * len(table.columns))
        for row in table.rows:
            name = f"{_escaped(row.method)} ({row.note})" if row.note else _escaped(row.method)
            lines.append(_line([name, *(_markdown_cell(cell) for cell in row.cells)]))
        parts.append("\n".join([*lines, "", *(f"- {_escaped(note)}" for note in table.notes)]))
    if settings:
        header, *rows = ([_escaped(cell) for cell in row] for row in settings)
        parts.append("\n".join(["## How it was run", "", _line(header), "|---" * len(header) + "|", *map(_line, rows)]))
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """Method, seeds, then mean and standard deviation of each column, unrounded; what is not there is empty."""
    header = ["method", "note", *(title for column in table.columns for title in (column.title, f"{column.title} (deviation over seeds)"))]
    rows = [[row.method, row.note, *(number for cell in row.cells for number in (cell.mean, cell.deviation_value))] for row in table.rows]
    return _csv([header, *rows])


def values_csv(values: Sequence[Value]) -> str:
    """The long form."""
    return _csv([["method", "seed", "task", "metric", "value"], *([v.method, v.seed, v.task, v.metric, v.value] for v in values)])


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([("" if np.isnan(cell) else repr(float(cell))) if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def _markdown_cell(cell: Cell) -> str:
    text = f"{cell.text} ± {cell.deviation}" if cell.deviation else cell.text
    return f"**{text}**" if cell.best else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("*", "\\*").replace("_", "\\_").replace("|", "\\|")


def _four(_: float) -> int:
    return 4


def _two(_: float) -> int:
    return 2


def _whole(_: float) -> int:
    return 0


def _digits(value: float) -> int:
    """So many that four digits show in all."""
    return max(0, 3 - math.floor(math.log10(value))) if value > 0 else 3


def _text(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if abs(value) < 1e7 else f"{value:.3g}"
