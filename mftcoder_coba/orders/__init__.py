"""Does merging models of several data orders help on these tasks, and is there an imbalance that it repairs (arXiv 2410.03743)?

The runs are ordinary runs of the comparing room. What is finished, merged or measured is not done again.

merges      which merges are made                bench      models -> results on the disk
imbalance   sample losses -> curves, correlations; pure
tables      results -> tables                    figures    curves -> the figure        showing    files and page
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mftcoder_coba.comparing import Method, Methods, PlannedRun, check_all_finished, trained, values_of
from mftcoder_coba.comparing.results import ALL, Outcome, Value, read_outcomes
from mftcoder_coba.comparing.showing import Comparison
from mftcoder_coba.config import Config, load_config
from mftcoder_coba.data import TaskData, TrainSchedule
from mftcoder_coba.errors import UserError
from mftcoder_coba.orders.bench import (
    Bench,
    best_of,
    clear_left_overs,
    measure_merge,
    measure_run,
    measured_samples,
    origin_of,
    validation_losses,
)
from mftcoder_coba.orders.imbalance import Imbalance, imbalance_of, positions_of
from mftcoder_coba.orders.merges import Merge, plan_merges
from mftcoder_coba.orders.showing import Findings, write_all
from mftcoder_coba.orders.tables import SELECTED_EPOCH, build_tables, correlation_values, mean_row, merge_values
from mftcoder_coba.planning import plan_steps, training_schedule

__all__ = ["orders"]


def orders(
    config: Path,
    out: Path,
    count: int = 5,
    methods: Sequence[str] = (),
    resample_rounds: int = 10,
    selection_seeds: int = 3,
    positions: int = 4000,
    overrides: Sequence[str] = (),
    launcher: str = "",
    keep_models: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains `count` models in as many data orders, merges them, measures all, and writes tables, a figure and a page.

    Args:
        config: the experiment.
        out: the folder of all this. The same command goes on in it; `count` and all that concerns merges may change.
        methods: names of `merging.METHODS`; none: `merges.DEFAULT_METHODS`.
        resample_rounds: of the second form of methods that resample; 0: there is none.
        selection_seeds: how many merges are made by a method that draws.
        positions: training samples whose loss is measured; 0: none.
        overrides: `a.b=value`, as for `train`.
        launcher: what starts the runs on several processes, such as "deepspeed --num_gpus 2"; "": one process.
        keep_models: keep the merged models; those of the runs always stay.
        say: takes each line that tells how it goes.

    Returns:
        the path of the page.

    Raises:
        UserError: what the user gave is wrong.
        RunFailure: some run did not finish; then nothing was merged.
    """
    base = load_config(config, overrides)
    if count < 1:
        raise UserError(f"there is at least one order, not {count}", "--count")
    if positions < 0:
        raise UserError(f"a number of samples is not negative, not {positions}", "--positions")
    merges = plan_merges(methods, count, resample_rounds, selection_seeds)
    _check_mergeable(base)
    with trained(config, base, order_methods(base, count), [], out, launcher, True, say) as (comparison, finished):
        check_all_finished(comparison)
        bench = Bench.of(comparison.out, base, comparison.tasks, positions)
        clear_left_overs(comparison.out)
        for run in finished:
            measure_run(bench, run, say)
        for number, what in enumerate(merges, start=1):
            done = measure_merge(bench, what, finished, keep_models)
            say(f"merge {number}/{len(merges)} {what.name}: {done}")
        found = _find(comparison, bench, finished, merges, selection_seeds)
        page = write_all(comparison, found, build_tables(found.singles, found.merged, found.correlations, comparison.tasks))
    for name in ("orders.md", "orders.csv", page.name):
        say(f"written: {comparison.out / name}")
    return page


def order_methods(base: Config, count: int) -> Methods:
    """The experiment in the orders 1, 2, ..., as methods of a comparison."""
    balancer = base.balancer.model_dump(exclude_unset=True)
    return {f"order-{number}": Method(balancer, {"data_order_seed": number}) for number in range(1, count + 1)}


def _check_mergeable(base: Config) -> None:
    """Raises UserError for adapters that cannot be merged into one model."""
    adapter = base.adapter
    if adapter is None:
        return
    fix = 'train full parameters (adapter: null), or a plain adapter: --set \'adapter={"kind": "lora"}\''
    if adapter.quantised:
        raise UserError("the base model is quantised: weights in 4 bits cannot be merged", "adapter", fix)
    if adapter.kind != "lora":
        what = f"the adapter {adapter.kind} has a gate for each task: its models are no single set of weights that could be merged"
        raise UserError(what, "adapter.kind", fix)


def _find(comparison: Comparison, bench: Bench, runs: Sequence[PlannedRun], merges: Sequence[Merge], seeds: int) -> Findings:
    """Reads all results."""
    outcomes, tasks, train = read_outcomes(runs), comparison.tasks, bench.train.splits
    schedules = [training_schedule(run.config, train) for run in runs]
    singles = values_of(outcomes, tasks, None)
    singles += [value for run, schedule in zip(runs, schedules, strict=True) for value in _epochs(run, schedule, singles)]
    start = _start(outcomes, tasks)
    merged = [value for what in merges for value in merge_values(what, validation_losses(bench, what, runs), start)]
    imbalance = _imbalances(bench, runs, schedules, merges) if bench.samples else {}
    seeds_of_orders = [run.config.run.order_seed for run in runs]
    correlations = [value for row, of in imbalance.items() for value in correlation_values(row, of, seeds_of_orders)]
    base, folders = bench.config.model.path, [run.folder for run in runs]
    commands = [(what.name, what.command(base, folders, bench.merged(what))) for what in merges]
    return Findings(outcomes, singles, merged, correlations, imbalance, (len(bench.samples), _learnable(train)), seeds, commands)


def _imbalances(bench: Bench, runs: Sequence[PlannedRun], schedules: Sequence[TrainSchedule], merges: Sequence[Merge]) -> dict[str, Imbalance]:
    """Row of the tables -> what its model's losses have to do with places in the first epoch."""
    positions = np.array([positions_of(schedule.epoch(0), bench.samples) for schedule in schedules])
    losses = np.array([measured_samples(bench, run.name, {"models": best_of([run])}) for run in runs])
    found = {mean_row(len(runs)): imbalance_of(losses, losses, positions)}
    for what in merges:
        if what.first:
            found[what.row] = imbalance_of(measured_samples(bench, what.name, origin_of(what, runs)), losses, positions)
    return found


def _epochs(run: PlannedRun, schedule: TrainSchedule, singles: Sequence[Value]) -> list[Value]:
    """How many epochs the run had made at its selected step."""
    plan = plan_steps(run.config, schedule, 1)
    end = math.inf if plan.end_row is None else plan.end_row
    steps = [value.value for value in singles if (value.method, value.metric) == (run.method, "selected_step")]
    return [Value(run.method, run.seed, ALL, SELECTED_EPOCH, schedule.epoch_of(min(round(step) * plan.global_batch_rows, end))) for step in steps]


def _start(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> dict[str, float]:
    """Validation loss of each task before training, the mean over the runs."""
    series = [outcome.run.metrics.validation for outcome in outcomes]
    return {task: float(np.mean([validation.of_task(task, "loss")[validation.index_of(0)] for validation in series])) for task in tasks}


def _learnable(train: Sequence[TaskData]) -> int:
    return sum(int(np.count_nonzero(task.supervised > 0)) for task in train)
