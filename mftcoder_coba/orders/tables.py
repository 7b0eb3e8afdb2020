"""Results -> the tables of the command: single models, their mean and the best of them, and what they were merged into. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mftcoder_coba.comparing.layouts import MEAN_RATIO, Column, Layout, four, loss_layouts, per_task, two, whole
from mftcoder_coba.comparing.results import ALL, AT_BEST, MEAN, Value
from mftcoder_coba.comparing.tables import Table, fill
from mftcoder_coba.orders.imbalance import Imbalance
from mftcoder_coba.orders.merges import Merge

BEST_ROW = "best single model"
WHEN = "of single models at the selected checkpoint, the validation that is best by validation.early_stopping.criterion; of merged ones as they are"
LOSS_CORRELATION, EXCESS_CORRELATION, SELECTED_EPOCH = "loss_correlation", "excess_correlation", "selected_epoch"


def mean_row(orders: int) -> str:
    return f"single models (mean of {orders})"


def merge_values(what: Merge, losses: Mapping[str, Mapping[str, float]], start: Mapping[str, float]) -> list[Value]:
    """Loss, perplexity and ratio of each task, and their means over tasks.

    Args:
        losses: task -> {"loss", "perplexity"}.
        start: task -> the loss before training.
    """
    found = {task: {**values, "ratio": values["loss"] / start[task]} for task, values in losses.items()}
    found[MEAN] = {metric: float(np.mean([found[task][metric] for task in losses])) for metric in AT_BEST}
    return [Value(what.row, what.seed, task, metric, values[metric]) for task, values in found.items() for metric in AT_BEST]


def correlation_values(row: str, imbalance: Imbalance, orders: Sequence[int]) -> list[Value]:
    """One for each order, which stands in the place of the seed."""
    metrics = {LOSS_CORRELATION: imbalance.loss_correlation, EXCESS_CORRELATION: imbalance.excess_correlation}
    return [
        Value(row, order, ALL, metric, float(value))
        for metric, values in metrics.items()
        for order, value in zip(orders, values, strict=True)
        if np.isfinite(value)
    ]


def best_single(singles: Sequence[Value]) -> str | None:
    """The method (an order) of the lowest mean ratio. None where no run has one."""
    ratios = {value.method: value.value for value in singles if (value.metric, value.task) == ("ratio", MEAN)}
    return min(ratios, key=ratios.get) if ratios else None


def build_tables(singles: Sequence[Value], merged: Sequence[Value], correlations: Sequence[Value], tasks: Sequence[str]) -> list[Table]:
    """Ratio, loss, perplexity; the correlations, where there are any; the single models one by one.

    Args:
        singles: of the runs, as `comparing.values_of` gives them, with `SELECTED_EPOCH`; a method is an order.
        merged: as `merge_values` gives them; a method is a row.
        correlations: as `correlation_values` gives them.
    """
    orders, best = list(dict.fromkeys(value.method for value in singles)), best_single(singles)
    every = mean_row(len(orders))
    shown = [Value(every, number, value.task, value.metric, value.value) for number, value in enumerate(singles) if value.metric in AT_BEST]
    shown += [Value(BEST_ROW, 0, value.task, value.metric, value.value) for value in singles if value.method == best and value.metric in AT_BEST]
    rows = {every: "", BEST_ROW: best or ""} | {value.method: "" for value in merged}
    seeds = {row: len({value.seed for value in merged if value.method == row}) for row in rows}
    rows |= {row: f"{count} seeds" for row, count in seeds.items() if count > 1}
    tables = fill(loss_layouts(tasks, WHEN), [*shown, *merged], rows, unmarked=[every])
    if correlations:
        tables += fill([_correlations()], correlations, dict.fromkeys((value.method for value in correlations), ""))
    return tables + fill([_single_models(tasks)], singles, dict.fromkeys(orders, ""))


def _correlations() -> Layout:
    columns = [Column("with the loss", LOSS_CORRELATION, ALL, four, False), Column("with the excess", EXCESS_CORRELATION, ALL, four, False)]
    notes = [
        "Spearman's rank correlation of a training sample's place in the first epoch with its mean token loss, mean ± standard deviation over "
        "orders; negative: what came early has the higher loss",
        "excess: the loss minus the mean loss of the single models of the other orders on the same sample, which removes how hard the sample is",
        "merged models are looked at in each of the orders; of those that draw, the one of seed 0",
    ]
    return Layout("imbalance", "Rank correlation of place and loss", columns, notes)


def _single_models(tasks: Sequence[str]) -> Layout:
    columns = [
        Column("selected step", "selected_step", ALL, whole, False),
        Column("epochs until it", SELECTED_EPOCH, ALL, two, False),
        Column("steps", "steps", ALL, whole, False),
        *per_task(tasks, "ratio", four),
        MEAN_RATIO,
    ]
    notes = ["ratio at the selected step; a single model is the checkpoint of this step", "epochs: passes over the training data"]
    return Layout("single_models", "Single models", columns, notes)
