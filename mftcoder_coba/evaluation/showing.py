"""Results for people, as a table, and for programs, as a JSON file; and the bar while they are made."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mftcoder_coba.errors import UserError

# Key of a task's results -> heading, form.
COLUMNS = {
    "samples": ("samples", ","),
    "tokens": ("supervised tokens", ","),
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ",.3f"),
    "answers": ("answers", ","),
    "span_f1": ("span F1", ".2f"),
    "exact_match": ("exact match", ".2f"),
    "bleu": ("BLEU", ".2f"),
}
PLAIN_WIDTH = 100  # columns of a table that goes to a file, at least


def progress_bar() -> Progress:
    """Of one loop, on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@contextlib.contextmanager
def json_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that writes results to `path`, whole or not at all; nothing where it is None. Numbers that are not finite become null.

    Raises:
        UserError: it cannot be written, which shows at once, or when the disk is full.
    """
    if path is None:
        yield lambda results: None
        return
    if path.exists() and not path.is_file():
        raise UserError("is no file", str(path), "name a file with --out")
    file = path.resolve()  # what a link leads to is replaced, not the link
    aside = file.with_name(f".{file.name}.new")

    def write(results: dict[str, Any]) -> None:
        with _explained(path):
            with aside.open("w", encoding="utf-8") as stream:
                stream.write(json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, file)

    try:
        with _explained(path):
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.touch()
        yield write
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the results cannot be written: {error.strerror}", str(path), "make room, or name another file with --out") from error


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def print_results(results: dict[str, Any], model: str, notes: Sequence[str]) -> None:
    """The table: a line for each task, and the mean over tasks.

    Args:
        results: as `evaluate` returns them.
        model: what was evaluated.
        notes: printed below.
    """
    shown = {key: of for key, of in COLUMNS.items() if any(key in task for task in results["tasks"].values())}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("task", "split"):
        table.add_column(heading, overflow="fold", min_width=5)
    for heading, _ in shown.values():
        table.add_column(heading, justify="right", min_width=5)
    for name, values in results["tasks"].items():
        table.add_row(name, results["split"], *(format(values[key], form) if key in values else "" for key, (_, form) in shown.items()))
    table.add_row(
        "mean over tasks", "", *(format(results["mean_loss"], form) if key == "loss" else "" for key, (_, form) in shown.items()), style="bold"
    )
    tables = [table, *([_code_table(results["code"])] if results.get("code") else [])]
    console = Console()
    if not sys.stdout.isatty():  # a file has no width: a line is as long as it needs to be
        measure = Console(width=10_000).measure
        console = Console(force_terminal=False, width=max(PLAIN_WIDTH, *(measure(table).maximum for table in tables)))
    console.print(f"\n{results['source']}: {model}", markup=False, highlight=False, soft_wrap=True)
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _code_table(files: dict[str, Any]) -> Table:
    """A line for each language of each file."""
    passing = sorted({key for file in files.values() for of in file.values() for key in of if "@" in key}, key=lambda key: int(key.split("@")[1]))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("code", "language"):
        table.add_column(heading, overflow="fold", min_width=5)
    for heading in ("problems", "programs", "passed", *passing):
        table.add_column(heading, justify="right", min_width=5)
    for name, languages in files.items():
        for language, of in languages.items():
            counts = (format(of[key], ",") for key in ("problems", "samples", "passed"))
            table.add_row(name, language, *counts, *(format(of[key], ".4f") if key in of else "" for key in passing))
    return table
