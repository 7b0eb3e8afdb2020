"""Run folders -> the numbers that are compared, one by one. Pure but for reading.

A mixture run has its values in one folder, a method with a model per task in one folder per task. What is about all tasks of a run has a
name in parentheses in the place of the task, which no task can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mftcoder_coba.comparing.runs import PlannedRun
from mftcoder_coba.reporting import Run, read_run
from mftcoder_coba.reporting.comparison import SAME_START
from mftcoder_coba.reporting.summary import best_step, seconds_per_step

MEAN, RANGE, DEVIATION, ALL = "(mean)", "(range)", "(deviation)", "(all)"
AT_BEST = ("ratio", "loss", "perplexity")


@dataclass(frozen=True)
class Outcome:
    """A finished run. `task`: the one task of a single-task run."""

    method: str
    seed: int
    task: str | None
    run: Run


@dataclass(frozen=True)
class Value:
    method: str
    seed: int
    task: str
    metric: str
    value: float


def read_outcomes(runs: Sequence[PlannedRun]) -> list[Outcome]:
    """Reads the folders of finished runs.

    Raises:
        UserError: a file of a folder is broken.
    """
    return [Outcome(run.method, run.seed, run.task, read_run(run.folder)) for run in runs]


def values_of(outcomes: Sequence[Outcome], tasks: Sequence[str], reference: str | None) -> list[Value]:
    """All numbers of a comparison.

    Args:
        tasks: of the mixture, in order.
        reference: the method that times are relative to, if there is one.

    Returns:
        per method and seed, in the order of the outcomes:

        ratio, loss, perplexity   of each task at the selected checkpoint, and their mean over tasks
        selected_step             the step of this checkpoint; for single-task runs one of each task
        lowest_ratio              of each task over all validations after the start, and their mean
        lowest_step               the step of this validation; for mixture runs also the range (largest - smallest) and the population
                                  standard deviation over tasks
        steps, seconds_per_step   see `summary.seconds_per_step`; for single-task runs of all their steps together
        relative_time             seconds_per_step over that of the reference with the same seed
        trained_parameters        of the run; for single-task runs of all of them together

        A mean over tasks, or a sum, is there only if all tasks are.
    """
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.method, outcome.seed), []).append(outcome)
    values = []
    for (method, seed), members in groups.items():
        found = _of_tasks(members, tasks) | _of_steps(members, tasks) | _of_time(members) | _of_size(members, tasks)
        values += [Value(method, seed, task, metric, value) for (metric, task), value in found.items() if np.isfinite(value)]
    seconds = {(value.method, value.seed): value.value for value in values if value.metric == "seconds_per_step"}
    for (method, seed), own in seconds.items():
        if (reference, seed) in seconds:
            values.append(Value(method, seed, ALL, "relative_time", own / seconds[reference, seed]))
    return values


def _of_tasks(members: Sequence[Outcome], tasks: Sequence[str]) -> dict[tuple[str, str], float]:
    """What holds at the selected checkpoint."""
    found: dict[tuple[str, str], float] = {}
    for outcome in members:
        best = best_step(outcome.run)
        row = outcome.run.metrics.validation.index_of(best.step) if best else None
        if row is None:
            continue
        found["selected_step", outcome.task or ALL] = best.step
        for task in [outcome.task] if outcome.task else tasks:
            found |= {(metric, task): float(outcome.run.metrics.validation.of_task(task, metric)[row]) for metric in AT_BEST}
    return found | {(metric, MEAN): float(np.mean([found.get((metric, task), np.nan) for task in tasks])) for metric in AT_BEST}


def _of_steps(members: Sequence[Outcome], tasks: Sequence[str]) -> dict[tuple[str, str], float]:
    """Where each task is at its lowest."""
    found: dict[tuple[str, str], float] = {}
    for outcome in members:
        validation = outcome.run.metrics.validation
        for task in [outcome.task] if outcome.task else tasks:
            ratio = np.where(validation.steps > 0, validation.of_task(task, "ratio"), np.nan)
            if np.isfinite(ratio).any():
                row = int(np.nanargmin(ratio))  # the first of equal ones
                found["lowest_ratio", task], found["lowest_step", task] = float(ratio[row]), float(validation.steps[row])
    found["lowest_ratio", MEAN] = float(np.mean([found.get(("lowest_ratio", task), np.nan) for task in tasks]))
    if members[0].task is None:  # steps of different runs are not on one scale
        steps = np.array([found.get(("lowest_step", task), np.nan) for task in tasks])
        found["lowest_step", RANGE], found["lowest_step", DEVIATION] = float(np.ptp(steps)), float(np.std(steps))
    return found


def _of_time(members: Sequence[Outcome]) -> dict[tuple[str, str], float]:
    """Runs of single tasks: the mean over all their steps."""
    steps = [len(np.unique(outcome.run.metrics.train.steps)) for outcome in members]
    if not sum(steps):
        return {}
    seconds = [seconds_per_step(outcome.run) for outcome in members]
    return {("steps", ALL): float(sum(steps)), ("seconds_per_step", ALL): float(np.average(seconds, weights=steps))}


def _of_size(members: Sequence[Outcome], tasks: Sequence[str]) -> dict[tuple[str, str], float]:
    counts = [float(outcome.run.environment.get("parameters", {}).get("trainable", np.nan)) for outcome in members]
    whole = members[0].task is None or {outcome.task for outcome in members} == set(tasks)
    return {("trained_parameters", ALL): sum(counts) if whole else np.nan}


def starts_apart(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[str]:
    """Tasks whose validation loss before training is not the same in all runs, as with a quantised base model or an adapter trained before."""
    found = []
    for task in tasks:
        series = [outcome.run.metrics.validation for outcome in outcomes if outcome.task in (None, task)]
        losses = np.array([validation.of_task(task, "loss")[0] for validation in series if len(validation) and validation.steps[0] == 0])
        losses = losses[np.isfinite(losses)]
        if len(losses) and np.ptp(losses) > SAME_START * losses.max():
            found.append(task)
    return found
