"""Values -> tables: mean and standard deviation over seeds, the best of each column marked; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mftcoder_coba.comparing.layouts import Column, Layout, comparison_layouts
from mftcoder_coba.comparing.results import MEAN, Value

ABSENT = "–"


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

    def ratio(method: str) -> float:
        found = [value.value for value in values if (value.method, value.metric, value.task) == (method, "ratio", MEAN)]
        return float(np.mean(found)) if found else np.inf

    sizes = len({value.value for value in values if value.metric == "trained_parameters"})
    rows = {method: "" if finished[method] == seeds else f"{finished[method]} of {seeds} seeds" for method in sorted(finished, key=ratio)}
    return fill(comparison_layouts(tasks, ", ".join(singles), reference, sizes > 1), values, rows, singles)


def fill(layouts: Sequence[Layout], values: Sequence[Value], rows: Mapping[str, str], unmarked: Sequence[str] = ()) -> list[Table]:
    """Tables of these layouts: the mean and deviation of the values of each method.

    Args:
        rows: method -> note, in the order of the rows.
        unmarked: methods that are never marked as the best.
    """
    samples: dict[tuple[str, str, str], list[float]] = {}
    for value in values:
        samples.setdefault((value.method, value.metric, value.task), []).append(value.value)
    tables = []
    for layout in layouts:
        cells = [_cells(column, list(rows), samples, unmarked) for column in layout.columns]
        of_methods = list(zip(*cells, strict=True))
        filled = [Row(method, note, list(of_method)) for (method, note), of_method in zip(rows.items(), of_methods, strict=True)]
        tables.append(Table(layout.name, layout.title, layout.columns, filled, layout.notes))
    return tables


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


def _text(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if abs(value) < 1e7 else f"{value:.3g}"
