"""What the command leaves behind: orders.md, orders.csv with a CSV for each table, the figure, and one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftcoder_coba.comparing.figures import draw
from mftcoder_coba.comparing.results import Outcome, Value, starts_apart
from mftcoder_coba.comparing.showing import Comparison, page_of
from mftcoder_coba.comparing.tables import Table, to_csv, to_markdown, values_csv
from mftcoder_coba.orders.figures import imbalance_chart
from mftcoder_coba.orders.imbalance import Imbalance
from mftcoder_coba.orders.tables import SELECTED_EPOCH, best_single, mean_row
from mftcoder_coba.reporting.figures import Chart
from mftcoder_coba.reporting.pages import write_text


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        outcomes: the runs.
        singles, merged, correlations: see `tables.build_tables`.
        imbalance: row of the tables -> what was measured; empty where nothing was.
        samples: how many training samples were measured, and of how many.
        seeds: of the merges that draw.
        commands: (merge, the command line that makes it).
    """

    outcomes: Sequence[Outcome]
    singles: Sequence[Value]
    merged: Sequence[Value]
    correlations: Sequence[Value]
    imbalance: Mapping[str, Imbalance]
    samples: tuple[int, int]
    seeds: int
    commands: Sequence[tuple[str, str]]


def write_all(comparison: Comparison, found: Findings, tables: Sequence[Table]) -> Path:
    """All files. Returns the path of the page."""
    out = comparison.out
    told = facts(comparison, found)
    write_text(out / "orders.csv", values_csv([*found.singles, *found.merged, *found.correlations]))
    for table in tables:
        write_text(out / f"orders-{table.name}.csv", to_csv(table))
    head = ["# Data orders and what they merge into", "", *(f"- {fact}" for fact in told)]
    commands = "\n".join(f"# {name}\n{command}" for name, command in found.commands)
    write_text(out / "orders.md", f"{to_markdown(tables, head)}\n## How it was merged\n\n```\n{commands}\n```\n")
    title = f"Data orders: {comparison.experiment['run']['name']}"
    charts = draw(_charts(comparison, found), out / "figures")
    return page_of(out / "orders.html", title, told, tables, charts, [["merge", "command"], *map(list, found.commands)], comparison.experiment)


def facts(comparison: Comparison, found: Findings) -> list[str]:
    """What was trained, selected and measured, a sentence each."""
    runs = comparison.runs
    orders = ", ".join(str(run.config.run.data_order_seed) for run in runs)
    told = [
        f"Experiment {comparison.config}; tasks: {', '.join(comparison.tasks)}; seed {runs[0].seed}.",
        f"{len(runs)} runs that differ in run.data_order_seed alone: {orders}.",
        _selection(comparison, found.singles),
        *_unseen(found.singles),
        f"The best single model is {best_single(found.singles)}, by the validation data that the tables show: that flatters it. "
        "Choosing the step by these data flatters all single models, and through them a little what is made of them.",
        "Ratios of merged models have the same denominator as those of the runs: the validation loss before training.",
    ]
    apart = starts_apart(found.outcomes, comparison.tasks)
    if apart:
        told.append(f"Not all runs start from the same validation loss of {', '.join(apart)}: ratios have different denominators; compare losses.")
    drawn = f", of merges that draw over {found.seeds} seeds" if found.seeds > 1 else "; merges that draw have one seed, and none"
    told.append(f"± is the standard deviation (n - 1): of single models over their orders{drawn}.")
    told.append("Bold: the least mean of a column; the mean of the single models is no model, and not marked.")
    if found.imbalance:
        count, all_samples = found.samples
        told.append(f"The imbalance was measured on {count:,} of {all_samples:,} training samples, of each task in proportion to its size.")
    return told


def _selection(comparison: Comparison, singles: Sequence[Value]) -> str:
    criterion = comparison.experiment["validation"]["early_stopping"]["criterion"]
    steps, epochs = _of_orders(singles, "selected_step"), _of_orders(singles, SELECTED_EPOCH)
    each = ", ".join(
        f"{run.method} step {steps[run.method]:,.0f} of {run.total_steps:,} ({epochs[run.method]:.2f} epochs)"
        for run in comparison.runs
        if run.method in steps
    )
    return f"Each single model is the checkpoint of its best validation by {criterion}, which may not be the last one: {each}."


def _unseen(singles: Sequence[Value]) -> list[str]:
    early = {order: epoch for order, epoch in _of_orders(singles, SELECTED_EPOCH).items() if epoch < 1}
    told = ", ".join(f"{order} after {epoch:.2f} epochs" for order, epoch in early.items())
    return [f"Selected within the first epoch: {told}. Such a model never saw the samples that come later in its order."] if early else []


def _of_orders(singles: Sequence[Value], metric: str) -> dict[str, float]:
    return {value.method: value.value for value in singles if value.metric == metric}


def _charts(comparison: Comparison, found: Findings) -> list[Chart]:
    return [imbalance_chart(found.imbalance, mean_row(len(comparison.runs)), found.samples[0])] if found.imbalance else []
