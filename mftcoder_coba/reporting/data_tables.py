"""What became of the data, as tables: from what `accounting.json` holds, for the terminal and for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PRINTED_SKIPS = 10
LEAST_WIDTH = 110  # a narrower terminal wraps lines; a table squeezed into it would lose figures


@dataclass(frozen=True)
class DataTable:
    """Rows begin with the name of what they are about."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def data_tables(accounting: dict[str, Any]) -> list[DataTable]:
    """The tables that the numbers suffice for.

    Args:
        accounting: {"tasks": {task: {split: SplitAccounting as a dictionary}}, "mixture": Mixture as one, or None}.
    """
    parts = [(f"{task} {split}", part) for task, splits in accounting.get("tasks", {}).items() for split, part in splits.items()]
    tables = [_samples(parts), _lengths(parts), _mixture(accounting.get("mixture"))]
    return [table for table in tables if table is not None and table.rows]


def print_data(accounting: dict[str, Any]) -> None:
    """The tables, and the first lines that were skipped."""
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    for table in data_tables(accounting):
        drawn = Table(title=table.title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1), pad_edge=False)
        for number, column in enumerate(table.columns):
            # Headings may take several lines; numbers stay whole.
            widest = max(len(row[number]) for row in table.rows)
            drawn.add_column(column.replace(" ", "\n"), justify="right" if number else "left", vertical="bottom", min_width=widest)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn, end="")
        console.print(table.note, style="dim", highlight=False, end="\n\n")
    for task, splits in accounting["tasks"].items():
        for split, part in splits.items():
            for line in part["skipped"][:PRINTED_SKIPS]:
                console.print(f"skipped {line['file']}:{line['line']}: {line['reason']}", markup=False, highlight=False, soft_wrap=True)
            if len(part["skipped"]) > PRINTED_SKIPS:
                more = len(part["skipped"]) - PRINTED_SKIPS
                console.print(f"and {more:,} more skipped lines of {task}/{split}; accounting.json of a run lists all")


def _samples(parts: list[tuple[str, dict[str, Any]]]) -> DataTable:
    """What became of every sample. A column that is zero throughout is left out."""
    columns = {
        "read": [part["read"]["samples"] for _, part in parts],
        "skipped": [len(part["skipped"]) for _, part in parts],
        "other split": [part["other_split"]["samples"] for _, part in parts],
        "too long": [part["too_long"]["samples"] for _, part in parts],
        "truncated": [part["truncated"]["samples"] for _, part in parts],
        "split": [part["split_samples"] for _, part in parts],
        "added by splitting": [part["added_documents"] for _, part in parts],
        "nothing to learn": [part["without_supervision"]["samples"] for _, part in parts],
        "used": [part["used"]["samples"] for _, part in parts],
        "duplicates": [part["duplicates"] for _, part in parts],
        "tokens": [part["used"]["tokens"] for _, part in parts],
    }
    shown = {name: [f"{value:,}" for value in values] for name, values in columns.items() if any(values) or name in ("read", "used")}
    shown["supervised %"] = [f"{100 * part['supervised_tokens'] / max(1, part['used']['tokens']):.1f}" for _, part in parts]
    rows = tuple((name, *(values[index] for values in shown.values())) for index, (name, _) in enumerate(parts))
    whole = "read + added by splitting" if "added by splitting" in shown else "read"
    parts_of_it = [name for name in ("skipped", "other split", "too long", "nothing to learn", "used") if name in shown]
    return DataTable("Samples", f"{whole} = {' + '.join(parts_of_it)}", ("task", *shown), rows)


def _lengths(parts: list[tuple[str, dict[str, Any]]]) -> DataTable:
    """The histogram of lengths before anything is cut."""
    bins = sorted({up_to for _, part in parts for up_to, _ in part["lengths"]})
    counts = [{up_to: samples for up_to, samples in part["lengths"]} for _, part in parts]
    rows = tuple((name, *(f"{of.get(up_to, 0):,}" for up_to in bins)) for (name, _), of in zip(parts, counts, strict=True))
    return DataTable("Lengths", "samples of at most so many tokens, as they came", ("task", *(f"{up_to:,}" for up_to in bins)), rows)


def _mixture(mixture: dict[str, Any] | None) -> DataTable | None:
    if not mixture:
        return None
    rows = tuple(
        (
            name,
            f"{task['documents']:,}",
            f"{task['passes']:.3g}",
            f"{100 * task['token_share']:.1f}",
            f"{100 * task['supervised_share']:.1f}",
            f"{task['documents_per_step']:.1f}",
            f"{task['fewest']:,}-{task['most']:,}",
            f"{task['steps_without']:,}",
        )
        for name, task in mixture["tasks"].items()
    )
    columns = ("task", "samples", "passes", "tokens %", "supervised %", "in a step", "fewest-most", "steps without")
    note = (
        f"{mixture['documents']:,} samples, {mixture['tokens']:,} tokens in {mixture['rows']:,} rows, {100 * mixture['fill']:.2f} % full; "
        f"{mixture['steps_per_epoch']:.2f} steps of {mixture['global_batch_rows']} rows"
    )
    return DataTable("The first epoch", note, columns, rows)
