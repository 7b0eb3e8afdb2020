"""Base config, methods, seeds -> the runs of a comparison, each with a whole config and its number of steps. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftcoder_coba.balancing import resolve
from mftcoder_coba.comparing.methods import Method, Methods, folder_name
from mftcoder_coba.config import CgcLoraConfig, Config, validate
from mftcoder_coba.data import Corpus, TrainSchedule
from mftcoder_coba.errors import UserError
from mftcoder_coba.planning import StepPlan, balancer_stream, plan_steps, training_schedule


@dataclass(frozen=True)
class PlannedRun:
    """`task`: the one task of a run of a method with a model per task; None: all tasks. `total_steps`: the step whose validation ends the run."""

    method: str
    seed: int
    task: str | None
    config: Config
    total_steps: int

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name


def check_methods(base: Config, methods: Methods) -> None:
    """Raises UserError for a method that does not fit the experiment, before any data is read."""
    for name, method in methods.items():
        _config_of(base, name, method)


def plan_runs(base: Config, methods: Methods, seeds: Sequence[int], out: Path, corpus: Corpus, alone: bool) -> list[PlannedRun]:
    """The runs, in the order in which they are made: all methods of a seed, then the next seed.

    Runs of one seed have the same validation mini-batches, the same data order and number of steps unless their methods name an order,
    and draw the initial values of their adapters with the same seed: those of one adapter are the same. A balancer that draws random
    numbers of its own draws with the seed of the run, unless its settings name another.

    Args:
        out: absolute; run folders lie in it.
        corpus: the tokenised data of `base`.
        alone: no launcher, one process: then also what depends on the balancer's mini-batches is checked here.

    Raises:
        UserError: a config that is not valid, a task without validation data, two runs of one name.
    """
    without = [name for name, part in zip(corpus.tasks, corpus.splits["valid"], strict=True) if len(part) == 0]
    if without:
        fix = "name `valid` files, or raise data.valid_fraction"
        raise UserError(f"methods are compared by validation losses; there is no validation data of {', '.join(without)}", "data.tasks[].valid", fix)
    runs = []
    for seed in seeds:
        seeded = validate(_tree(base, out, seed), f"seed {seed}")
        schedules: dict[int, TrainSchedule] = {}
        stream = balancer_stream(seeded, corpus.splits["valid"], seeded.validation.balancer_rows_per_rank)
        for name, method in methods.items():
            config = _config_of(seeded, name, method)
            order = config.run.order_seed
            if order not in schedules:
                schedules[order] = training_schedule(config, corpus.splits["train"])
            schedule = schedules[order]
            plan = plan_steps(config, schedule, 1)  # the number of steps does not depend on that of processes
            if method.balancer is None:
                runs += [_single_task(config, name, number, schedule, plan, corpus) for number in range(len(corpus.tasks))]
                continue
            changes = {"run.name": f"{folder_name(name)}-seed{seed}", "balancer": _seeded(method.balancer, config)}
            config = validate(_changed(config.model_dump(), changes), f"method {name}")
            if alone and stream:
                resolve(config.balancer, stream.coverage)
            runs.append(PlannedRun(name, seed, None, config, plan.total_steps))
    _names_differ(runs)
    return runs


def passes_made(schedule: TrainSchedule, plan: StepPlan) -> list[float]:
    """How often each task's training data is seen in a whole run: passes in an epoch x epochs.

    Cut after nine digits, but for what is missing to them by rounding only: read as a number of epochs, the last bit of a quotient must
    not make it a row more.
    """
    rows = plan.total_steps * plan.global_batch_rows if plan.end_row is None else plan.end_row
    epochs = schedule.epoch_of(rows)
    return [math.floor(passes * epochs * 1e9 + 1e-3) / 1e9 for passes in schedule.passes_per_epoch]


def _config_of(base: Config, name: str, method: Method) -> Config:
    """The experiment with the method's sections.

    Raises:
        UserError: a section that the config does not allow; clusters of tasks for models of one task.
    """
    config = validate(method.over(base.model_dump()), f"method {name}")
    if method.per_task and isinstance(config.adapter, CgcLoraConfig):
        fix = f'give the method an adapter of its own in a --plan file: {{"{name}": {{"per_task": true, "adapter": {{"kind": "lora"}}}}}}'
        raise UserError("the method trains a model per task, and the adapter cgc_lora has clusters of several tasks", f"method {name}", fix)
    return config


def _single_task(mixture: Config, method: str, number: int, schedule: TrainSchedule, plan: StepPlan, corpus: Corpus) -> PlannedRun:
    """One task alone: as many passes over its data as the mixture makes, in steps of as many rows.

    It has about as many validations as the mixture, and its learning rate rises over the same part of the run: else a small task, whose
    run is short, would be measured once and never reach the rate.
    """
    task, seed = corpus.tasks[number], mixture.run.seed
    part = mixture.model_dump()["data"]["tasks"][number] | {"share": None}
    changes = {
        "run.name": f"{folder_name(method)}-{task}-seed{seed}",
        "data.tasks": [part],
        "training.epochs": passes_made(schedule, plan)[number],
        "training.max_steps": None,
        "validation.early_stopping.criterion": "mean_ratio",  # of the one task
    }
    source = f"method {method}, task {task}"
    tree = _changed(mixture.model_dump(), changes)
    config = validate(tree, source)
    train = [corpus.splits["train"][number]]
    steps = plan_steps(config, training_schedule(config, train), 1).total_steps
    changes = {"validation.every_steps": max(1, round(mixture.validation.every_steps * steps / plan.total_steps))}
    if mixture.training.warmup_steps >= 1:
        changes["training.warmup_steps"] = min(mixture.training.warmup_steps / plan.total_steps, 0.999)
    return PlannedRun(method, seed, task, validate(_changed(tree, changes), source), steps)


def _tree(base: Config, out: Path, seed: int) -> dict[str, Any]:
    """What all runs have in common. Nobody stops early: every method gets the whole budget, and its best step is still selected."""
    changes = {
        "run.dir": str(out),
        "run.seed": seed,
        "validation.early_stopping.patience": None,
        "checkpoint.keep": 1,
        "checkpoint.resume": "auto",
    }
    return _changed(base.model_dump(), changes)


def _seeded(section: dict[str, Any], config: Config) -> dict[str, Any]:
    """A balancer's section, with the run's seed if it draws random numbers and names no seed. `config` holds it, validated."""
    return {"seed": config.run.seed, **section} if "seed" in type(config.balancer).model_fields else section


def _changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with values at paths such as "run.seed" replaced."""
    tree = dict(tree)
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        tree[first] = _changed(tree[first], {rest: value}) if rest else value
    return tree


def _names_differ(runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        other = seen.setdefault(run.name.lower(), run)  # some file systems do not tell case
        if other is not run:
            raise UserError(f"the methods {other.method} and {run.method} would both write to {run.name}", "--plan", "rename one of them")
