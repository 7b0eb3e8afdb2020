"""Several runs side by side, as plain values: what the compared report shows in its tables and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting.records import Run
from mftcoder_coba.reporting.summary import Best, TaskSummary, balancer_name, best_step, plural, seconds_per_step, task_summaries

# Starting losses that differ by no more than this part are the same: other hardware rounds in another order.
SAME_START = 1e-3
# What tells runs apart without being a setting.
NO_SETTINGS = {"run.name", "run.dir", "command", "started"}
ABSENT = object()  # a key that a run's config does not have: other than null


@dataclass(frozen=True)
class RunRow:
    """One run; NaN and None where its files do not say."""

    label: str
    balancer: str
    steps: int
    best: Best | None
    mean_ratio: float  # at the best step, over the run's own tasks
    common_ratio: float  # at the best step, over the tasks that all runs have
    seconds_per_step: float
    tasks: dict[str, TaskSummary]


@dataclass(frozen=True)
class Difference:
    """A key whose values are not the same in all runs; `values` in the order of the runs, ABSENT where a run has no such key."""

    key: str
    values: list[Any]


@dataclass(frozen=True)
class Comparison:
    """Runs under labels that differ, in the order given."""

    labels: list[str]
    runs: list[Run]

    @property
    def tasks(self) -> list[str]:
        """The tasks of all runs, in the order in which they first appear."""
        return list(dict.fromkeys(task for run in self.runs for task in run.tasks))

    @property
    def common_tasks(self) -> list[str]:
        """The tasks of all runs of which tasks are known."""
        return [task for task in self.tasks if all(task in run.tasks for run in self.runs if run.tasks)]

    @property
    def last_step(self) -> int:
        return max(run.metrics.last_step for run in self.runs)

    def rows(self) -> list[RunRow]:
        return [self._row(label, run) for label, run in zip(self.labels, self.runs, strict=True)]

    def _row(self, label: str, run: Run) -> RunRow:
        best, tasks = best_step(run), {task.name: task for task in task_summaries(run)}
        index = run.metrics.validation.index_of(best.step) if best else None
        mean = float("nan") if index is None else float(run.metrics.validation.value("mean_ratio")[index])
        common = [tasks[task].ratio if task in tasks else float("nan") for task in self.common_tasks]
        common_mean = float(np.mean(common)) if common else float("nan")
        return RunRow(label, balancer_name(run), run.metrics.last_step, best, mean, common_mean, seconds_per_step(run), tasks)

    def differences(self) -> list[Difference]:
        """Of the configs, and of the environments under `environment.`; the only keys of which runs without such a file say nothing."""
        configs = _differences([flat(run.config) for run in self.runs])
        environments = _differences([flat(run.environment) for run in self.runs])
        return configs + [Difference(f"environment.{found.key}", found.values) for found in environments]


def compare(runs: Sequence[Run]) -> Comparison:
    """Raises UserError: a folder is given twice."""
    folders = [run.folder.resolve() for run in runs]
    twice = [folder for folder, count in Counter(folders).items() if count > 1]
    if twice:
        raise UserError("this run is given twice", str(twice[0]), "name each run folder once")
    return Comparison(_labels([run.name for run in runs], folders), list(runs))


def sentences(comparison: Comparison) -> list[str]:
    """The comparison in plain sentences, with what makes it unfair."""
    rows = comparison.rows()
    texts = [_what_is_compared(comparison), _lowest(comparison, rows)]
    starts = [{task.name: task.loss_before for task in row.tasks.values()} for row in rows]
    moved = [task for task in comparison.common_tasks if not _same([start[task] for start in starts if task in start])]
    if moved:
        texts.append(
            f"The runs do not start from the same validation loss of {_listed(moved)}: their ratios have different denominators; compare losses."
        )
    steps = [row.steps for row in rows if row.steps]
    if len(set(steps)) > 1:
        texts.append(f"They have trained for different numbers of steps, from {min(steps)} to {max(steps)}.")
    waiting = [row.label for row in rows if not row.steps]
    if waiting:
        texts.append(f"Without any step so far: {', '.join(waiting)}.")
    return [text for text in texts if text]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects under their joined names. Objects in a list that have a name stand under it."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
            value = {item["name"]: {inner: part for inner, part in item.items() if inner != "name"} for item in value}
        leaves.update(flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return leaves


def _differences(settings: list[dict[str, Any]]) -> list[Difference]:
    """A run of which nothing is known (no file) makes no difference."""
    known = [leaves for leaves in settings if leaves]
    found = []
    for key in dict.fromkeys(key for leaves in known for key in leaves):
        first = known[0].get(key, ABSENT)
        if key not in NO_SETTINGS and any(leaves.get(key, ABSENT) != first for leaves in known):
            found.append(Difference(key, [leaves.get(key, ABSENT) for leaves in settings]))
    return found


def _labels(names: list[str], folders: list[Path]) -> list[str]:
    """The runs' names; where two are equal, as much of the folders' ends as tells all apart."""
    parts = 1
    while len(set(names)) < len(names):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        parts += 1
    return names


def _what_is_compared(comparison: Comparison) -> str:
    tasks, common = comparison.tasks, comparison.common_tasks
    same = f"on the same {len(tasks)} {plural('task', len(tasks))}"
    which = same if len(common) == len(tasks) else f"on {len(tasks)} different tasks, {len(common)} of them common to all"
    return f"{len(comparison.runs)} runs, {which}."


def _lowest(comparison: Comparison, rows: list[RunRow]) -> str:
    whole = len(comparison.common_tasks) == len(comparison.tasks)
    values = {row.label: row.mean_ratio if whole else row.common_ratio for row in rows}
    values = {label: value for label, value in values.items() if np.isfinite(value)}
    if len(values) < 2:
        return ""
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    over = "" if whole else f" over the {len(comparison.common_tasks)} common {plural('task', len(comparison.common_tasks))}"
    step = {row.label: row.best.step for row in rows if row.best}
    return (
        f"At each run's best step, the mean validation loss ratio{over} is lowest in {lowest} ({values[lowest]:.3f}, step {step[lowest]}) "
        f"and highest in {highest} ({values[highest]:.3f}, step {step[highest]})."
    )


def _same(losses: list[float]) -> bool:
    known = [loss for loss in losses if np.isfinite(loss)]
    return not known or max(known) - min(known) <= SAME_START * max(known)


def _listed(names: list[str]) -> str:
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} tasks"
