"""What a run came to, as plain values and plain sentences. The final table and the report both show these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mftcoder_coba.reporting.gates import Gates
from mftcoder_coba.reporting.records import Run

# A task counts as past its minimum when its last validation ratio is above its lowest by more than this part of it.
PAST_MINIMUM = 0.01
# A task counts as converged once it made this part of its fall.
CONVERGED = 0.9
# Gates have moved when some task gives its own experts more or less than even gates would, by so much of the whole.
GATES_MOVED = 0.02
# Names of methods as people write them; the others are words already.
WRITTEN = {
    "coba": "CoBa",
    "lbtw": "LBTW",
    "dwa": "DWA",
    "gradnorm": "GradNorm",
    "famo": "FAMO",
    "metaweighting": "MetaWeighting",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "cgc_lora": "CGC-LoRA",
    "moe_lora": "MOELoRA",
}


@dataclass(frozen=True)
class Best:
    """The step whose model is exported. `recorded` is False where the run has written no best.json (yet)."""

    step: int
    criterion: str
    value: float
    recorded: bool

    @property
    def rule(self) -> str:
        """The criterion as a sentence says it."""
        return self.criterion.replace("_", " ") if not self.criterion.startswith("task:") else f"the ratio of {self.criterion[5:]}"


@dataclass(frozen=True)
class TaskSummary:
    """One task; NaN where the run's files do not say. Losses in nats a token."""

    name: str
    loss_before: float
    loss_best: float
    ratio: float
    perplexity: float
    final_weight: float
    train_tokens: int
    presence: float  # part of the steps with at least one token of the task, in 0..1


def best_step(run: Run) -> Best | None:
    """From best.json; without it, the lowest mean ratio among the validations after the start."""
    if run.best:
        return Best(run.best["step"], run.best["criterion"], run.best["value"], recorded=True)
    validation = run.metrics.validation
    mean_ratio = np.where(validation.steps > 0, validation.value("mean_ratio"), np.nan)
    if not np.isfinite(mean_ratio).any():
        return None
    row = int(np.nanargmin(mean_ratio))
    return Best(int(validation.steps[row]), "mean_ratio", float(mean_ratio[row]), recorded=False)


def gates_at_best(run: Run) -> Gates | None:
    """The gates of the best step; the newest where that step has none. None where the run has no gates."""
    gates, best = run.metrics.gates, best_step(run)
    of_best = [found for found in gates if best is not None and found.step == best.step]
    return next(reversed(of_best or gates), None)


def task_summaries(run: Run) -> list[TaskSummary]:
    validation, train = run.metrics.validation, run.metrics.train
    best = best_step(run)
    first, at_best = validation.index_of(0), validation.index_of(best.step) if best else None

    def valid(task: str, name: str, row: int | None) -> float:
        return float("nan") if row is None else float(validation.of_task(task, name)[row])

    rows = []
    for task in run.tasks:
        tokens = np.nan_to_num(train.of_task(task, "tokens"))
        rows.append(
            TaskSummary(
                task,
                valid(task, "loss", first),
                valid(task, "loss", at_best),
                valid(task, "ratio", at_best),
                valid(task, "perplexity", at_best),
                _last(train.of_task(task, "weight")),
                int(tokens.sum()),
                float((tokens > 0).mean()) if len(tokens) else float("nan"),
            )
        )
    return rows


def balancer_name(run: Run) -> str:
    """The method; with a star, as in the CoBa paper, where it looks at validation losses instead of training losses. Empty where
    no config tells."""
    kind = run.setting("balancer.kind") or ""
    return WRITTEN.get(kind, kind) + ("*" if run.setting("balancer.signal") == "validation" else "")


def seconds_per_step(run: Run) -> float:
    """Of a step in the middle of all, with what its balancer looked at; validations and checkpoints are not in it. NaN where the
    records do not tell."""
    train, balancer = (series.value("seconds") for series in (run.metrics.train, run.metrics.balancer))
    train, balancer = train[np.isfinite(train)], balancer[np.isfinite(balancer)]
    if not len(train):
        return float("nan")
    observing = float(np.median(balancer)) * len(balancer) / len(train) if len(balancer) else 0.0
    return float(np.median(train)) + observing


def sentences(run: Run) -> list[str]:
    """The run in plain sentences; what its files do not say is left out."""
    texts = (_what_was_trained(run), _best(run), _spread(run), _balance(run), _past_minimum(run), _own_experts(run), _early_stop(run))
    return [text for text in texts if text]


def _what_was_trained(run: Run) -> str:
    model, adapter, steps = run.setting("model.path"), run.setting("adapter"), run.metrics.last_step
    how = f"by {_adapter(adapter)}" if adapter else "in all its parameters"
    subject = f"The model {_short_path(model)} was fine-tuned {how}" if model else "The model was fine-tuned"
    names = ", ".join(run.tasks)  # a long list is left to the table
    tasks = f"{len(run.tasks)} {plural('task', len(run.tasks))}" + (f" ({names})" if len(names) <= 120 else "")
    balancer = balancer_name(run)
    by = f" with the balancer {balancer}" if balancer else ""
    epoch = _last(run.metrics.train.value("epoch"))
    epochs = f" ({epoch:.2f} epochs)" if np.isfinite(epoch) else ""
    return f"{subject} on {tasks}{by} for {steps} {plural('step', steps)}{epochs}."


def _best(run: Run) -> str:
    best = best_step(run)
    if best is None:
        return "No validation after the start has been recorded."
    row = run.metrics.validation.index_of(best.step)
    mean = float("nan") if row is None else float(run.metrics.validation.value("mean_ratio")[row])
    which = f"The best step by {best.rule} is {best.step}" if best.recorded else f"The lowest mean ratio so far is that of step {best.step}"
    return f"{which}; there the mean validation loss ratio is {mean:.3f}." if np.isfinite(mean) else f"{which}."


def _spread(run: Run) -> str:
    ratios = {task.name: task.ratio for task in task_summaries(run) if np.isfinite(task.ratio)}
    if len(ratios) < 2:
        return ""
    most, least = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    return f"The loss of {most} came down furthest (ratio {ratios[most]:.3f}), that of {least} least (ratio {ratios[least]:.3f})."


def _balance(run: Run) -> str:
    """Which task converged first and last: the first validation at which a task has made 90 % of its fall."""
    reached = {}
    for task in run.tasks:
        steps, ratio = _curve(run, task)
        if len(ratio) >= 3 and ratio.min() < ratio[0]:
            goal = ratio[0] - CONVERGED * (ratio[0] - ratio.min())
            reached[task] = int(steps[np.flatnonzero(ratio <= goal)[0]])
    first, last = min(reached.values(), default=0), max(reached.values(), default=0)
    if first == last:
        return ""
    fastest, slowest = (_listed([task for task, step in reached.items() if step == which]) for which in (first, last))
    return f"Fastest to converge: {fastest}, with {CONVERGED:.0%} of the fall made by step {first}; slowest: {slowest}, by step {last}."


def _past_minimum(run: Run) -> str:
    past = []
    for task in run.tasks:
        steps, ratio = _curve(run, task)
        if len(ratio) and ratio[-1] > ratio.min() * (1 + PAST_MINIMUM):
            past.append(f"{task} (lowest at step {steps[ratio.argmin()]}: {ratio.min():.3f}, at step {steps[-1]}: {ratio[-1]:.3f})")
    if past:
        return f"Past {'its' if len(past) == 1 else 'their'} minimum by more than {PAST_MINIMUM:.0%}: {', '.join(past)}."
    return "No task is past its minimum." if len(run.metrics.validation) > 1 else ""


def _own_experts(run: Run) -> str:
    """Which task uses its own experts most, and which least; only where tasks have both kinds and the gates have moved."""
    gates = gates_at_best(run)
    both = [task for task in run.tasks if task in gates.experts and gates.has_both_kinds(task)] if gates else []
    own = {task: 1 - gates.common_share(task) for task in both}
    even = {task: 1 - gates.even_common_share(task) for task in both}
    beyond = {task: own[task] - even[task] for task in both if np.isfinite(own[task])}
    if max(map(abs, beyond.values()), default=0.0) <= GATES_MOVED:
        return ""
    most, least = max(beyond, key=beyond.__getitem__), min(beyond, key=beyond.__getitem__)
    shares = f"{own[most]:.0%} to the own experts of {most}"
    if least != most:
        shares += f" (most of all tasks) and {own[least]:.0%} to those of {least} (least)"
    return f"At step {gates.step}, the gates give, on average over the layers, {shares}; even gates would give {even[most]:.0%}."


def _early_stop(run: Run) -> str:
    stops = [event for event in run.metrics.events if event.get("name") == "early_stop"]
    return f"The run stopped early at step {stops[-1]['step']}: {stops[-1].get('why', '')}".rstrip(": .") + "." if stops else ""


def _curve(run: Run, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and ratios of the task's full validations, without gaps."""
    ratio = run.metrics.validation.of_task(task, "ratio")
    seen = np.isfinite(ratio)
    return run.metrics.validation.steps[seen], ratio[seen]


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def _adapter(adapter: dict[str, Any]) -> str:
    kind, rank = adapter["kind"], adapter.get("rank")
    return WRITTEN.get(kind, kind) + (f" of rank {rank}" if rank else "")


def _short_path(path: str) -> str:
    """A hub id as it is; of a file path the last part."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path.startswith(("/", ".")) else path


def _listed(tasks: list[str]) -> str:
    return " and ".join(tasks) if len(tasks) <= 2 else f"{len(tasks)} tasks"


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
