"""What a comparison leaves behind: tables as Markdown and CSV, figures, and one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftcoder_coba.comparing.figures import charts_of, draw
from mftcoder_coba.comparing.methods import Methods
from mftcoder_coba.comparing.results import Outcome, Value, read_outcomes, starts_apart, values_of
from mftcoder_coba.comparing.runs import PlannedRun
from mftcoder_coba.comparing.tables import Table, build_tables, seeds_note, to_csv, to_markdown, values_csv
from mftcoder_coba.reporting.pages import png_uri, write_text
from mftcoder_coba.reporting.pages import write_page as write_html


@dataclass(frozen=True)
class Comparison:
    """What was asked for: `failed` is the reason of each run that is not finished, by its name."""

    out: Path
    config: str
    experiment: dict[str, Any]
    methods: Methods
    tasks: Sequence[str]
    runs: Sequence[PlannedRun]
    failed: dict[str, str]

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.runs))


def write_tables(comparison: Comparison, finished: Sequence[PlannedRun]) -> tuple[list[Outcome], list[Table]]:
    """compare.md, compare.csv and a CSV per table, from the runs that are finished.

    Raises:
        UserError: a file of a run folder is broken.
    """
    outcomes = read_outcomes(finished)
    reference = _reference(comparison.methods)
    values = values_of(outcomes, comparison.tasks, reference)
    tables = build_tables(
        values,
        _finished_seeds(comparison, finished),
        len(comparison.seeds),
        comparison.tasks,
        [name for name, method in comparison.methods.items() if method.per_task],
        reference or "uniform",
    )
    write_text(comparison.out / "compare.csv", values_csv(_in_order(values, comparison)))
    for table in tables:
        write_text(comparison.out / f"compare-{table.name}.csv", to_csv(table))
    head = [f"# {_title(comparison.methods)}", "", *(f"- {line}" for line in facts(comparison, finished, outcomes))]
    write_text(comparison.out / "compare.md", to_markdown(tables, head, settings_of(comparison)))
    return outcomes, tables


def write_page(comparison: Comparison, finished: Sequence[PlannedRun]) -> Path:
    """All tables and figures, and compare.html, which needs no other file and no network. Returns its path."""
    outcomes, tables = write_tables(comparison, finished)
    charts = draw(charts_of(outcomes, comparison.tasks), comparison.out / "figures")
    title = f"{_title(comparison.methods)}: {comparison.experiment['run']['name']}"
    told = facts(comparison, finished, outcomes)
    return page_of(comparison.out / "compare.html", title, told, tables, charts, settings_of(comparison), comparison.experiment)


def page_of(
    file: Path,
    title: str,
    told: Sequence[str],
    tables: Sequence[Table],
    charts: Sequence[dict[str, Any]],
    settings: Sequence[Sequence[str]],
    experiment: dict[str, Any],
) -> Path:
    """Writes a page and returns its path: facts, the first table, figures, the other tables, and how it was run.

    Args:
        charts: as `figures.draw` gives them.
        settings: the cells of the last table, row by row, header first.
        experiment: the config, shown whole.
    """
    return write_html(
        file,
        Path(__file__).with_name("comparison.html"),
        title=title,
        facts=told,
        tables=tables,
        charts=[{"chart": drawn["chart"], "wide": png_uri(drawn["wide"]), "narrow": png_uri(drawn["narrow"])} for drawn in charts],
        methods=settings,
        config=json.dumps(experiment, indent=2, ensure_ascii=False),
    )


def facts(comparison: Comparison, finished: Sequence[PlannedRun], outcomes: Sequence[Outcome]) -> list[str]:
    """What was compared and what is missing, a sentence each."""
    steps = sorted({run.total_steps for run in comparison.runs if run.task is None})
    interval = comparison.experiment["validation"]["every_steps"]
    told = [
        f"Experiment {comparison.config}; tasks: {', '.join(comparison.tasks)}; seeds: {', '.join(map(str, comparison.seeds))}.",
    ]
    if steps:
        orders = any("data_order_seed" in method.changes for method in comparison.methods.values())
        whose = "each run packs" if orders else "each seed packs"
        number = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} ({whose} its data in its own order)"
        adapters = " of each adapter" if any("adapter" in method.changes for method in comparison.methods.values()) else ""
        order = "the data order where methods do not name one" if orders else "data order"
        shared = f"runs of one seed share initial values{adapters}, {order} and validation mini-batches"
        told.append(f"Every method trains for {number} steps and is validated every {interval:,}; {shared}.")
    singles = [name for name, method in comparison.methods.items() if method.per_task]
    if singles:
        runs = [run for run in comparison.runs if run.method == singles[0] and run.seed == comparison.seeds[0]]
        passes = ", ".join(f"{run.task} {run.total_steps:,} ({run.config.training.epochs:.3g} passes)" for run in runs)
        who = f"{', '.join(singles)}: a model per task"
        told.append(
            f"{who}, with as many passes over the task's data as the mixture and the same global batch; steps with seed {runs[0].seed}: {passes}."
        )
    apart = starts_apart(outcomes, comparison.tasks)
    if apart:
        told.append(f"Not all runs start from the same validation loss of {', '.join(apart)}: ratios have different denominators; compare losses.")
    told.append(seeds_note(len(comparison.seeds)))
    told.append("Checkpoints are selected by the validation data that the tables show, which flatters all methods alike a little.")
    sizes = sorted({(str(outcome.run.environment.get("device")), outcome.run.environment.get("world_size")) for outcome in outcomes}, key=str)
    if len(sizes) > 1:
        told.append(f"Runs were made on different processes, so times do not compare: {', '.join(f'{size} x {device}' for device, size in sizes)}.")
    done = {run.name for run in finished}
    missing = [run.name for run in comparison.runs if run.name not in done]
    if missing:
        told.append(f"Not finished, and left out: {', '.join(missing)}. Means of methods with other seeds do not compare exactly.")
    return told


def settings_of(comparison: Comparison) -> list[list[str]]:
    """What the methods are: a header, then a row for each. The others than the balancer are there if some method changes them."""
    header, rows = ["method", "balancer"], []
    changed = [part for part in ("adapter", "training", "data_order_seed") if any(part in method.changes for method in comparison.methods.values())]
    header += [{"adapter": "adapter", "training": "learning rate", "data_order_seed": "seed of the data order"}[part] for part in changed]
    for name, method in comparison.methods.items():
        config = next(run.config for run in comparison.runs if run.method == name)
        adapter = {"kind": config.adapter.kind} | config.adapter.model_dump(exclude_none=True) if config.adapter else None
        order = config.run.data_order_seed
        shown = {
            "adapter": json.dumps(adapter) if adapter else "none: all parameters are trained",
            "training": f"{config.training.learning_rate:g}",
            "data_order_seed": "that of the run" if order is None else str(order),
        }
        balancer = json.dumps(method.balancer) if method.balancer else "none: one model per task"
        rows.append([name, balancer, *(shown[part] for part in changed)])
    return [header, *rows]


def _title(methods: Methods) -> str:
    return "Comparison of methods" if any(method.changes for method in methods.values()) else "Comparison of balancers"


def _reference(methods: Methods) -> str | None:
    """What times are relative to: of balancers `uniform`, which costs nothing; where methods differ in more, the first that trains one model."""
    shared = {name: method for name, method in methods.items() if method.balancer}
    if any(method.changes for method in methods.values()):
        return next(iter(shared), None)
    return next((name for name, method in shared.items() if method.balancer["kind"] == "uniform"), None)


def _finished_seeds(comparison: Comparison, finished: Sequence[PlannedRun]) -> dict[str, int]:
    """Method -> seeds of which all runs are there."""
    done = {run.name for run in finished}
    missing = {(run.method, run.seed) for run in comparison.runs if run.name not in done}
    return {method: sum((method, seed) not in missing for seed in comparison.seeds) for method in comparison.methods}


def _in_order(values: Sequence[Value], comparison: Comparison) -> list[Value]:
    methods = list(comparison.methods)
    return sorted(values, key=lambda value: (methods.index(value.method), comparison.seeds.index(value.seed)))
