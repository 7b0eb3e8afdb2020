"""Run folders made by hand, and plans that need no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mftcoder_coba.config import Config, validate
from mftcoder_coba.data import Corpus, TaskData


def experiment(**changes) -> Config:
    tree = {
        "run": {"name": "base", "dir": "runs", "seed": 5},
        "model": {"path": "none"},
        "data": {"tasks": [{"name": task, "train": ["none"]} for task in ("a", "b")], "sequence_length": 16, "packing": "none"},
        "balancer": {"kind": "coba"},
        "training": {"epochs": 3, "global_batch_rows": 4, "micro_batch_rows": 2, "learning_rate": 1e-3},
        "validation": {"every_steps": 10},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        tree[section] = {**tree[section], key: value} if key else value
    return validate(tree, "test")


@pytest.fixture
def make_experiment() -> Callable[..., Config]:
    """Changes by keyword: `training__epochs=2`."""
    return experiment


def task_data(size: int) -> TaskData:
    ids, supervised = np.zeros(8, np.int32), np.ones(8, bool)
    return TaskData.from_samples([(ids, supervised)] * size)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """40 samples of `a`, 8 of `b`, each a row of its own."""
    splits = {"train": [task_data(40), task_data(8)], "valid": [task_data(4), task_data(4)], "test": [task_data(0), task_data(0)]}
    return Corpus(("a", "b"), splits, {}, "mftcoder", 0)


def write_run(
    folder: Path,
    ratios: dict[str, Sequence[float]],
    best: int,
    every: int = 10,
    train: float = 1.0,
    observing: float | None = None,
    trained: int | None = None,
    **config,
) -> Path:
    """Validations at 0, `every`, 2 `every`, ...; the loss before training is 2 nats in each task. `best`: the selected step; `trained`:
    number of trained parameters."""
    folder.mkdir(parents=True)
    records = []
    count = len(next(iter(ratios.values())))
    for number in range(count):
        if number:
            for step in range((number - 1) * every + 1, number * every + 1):
                tasks = {task: {"loss": 1.0, "tokens": 5, "weight": 1 / len(ratios)} for task in ratios}
                records.append({"kind": "train", "step": step, "seconds": train, "tasks": tasks})
                if observing is not None:
                    records.append({"kind": "balancer", "step": step, "seconds": observing, "tasks": {}})
        now = {task: values[number] for task, values in ratios.items()}
        tasks = {task: {"loss": 2 * ratio, "ratio": ratio, "perplexity": 10 * ratio, "tokens": 9} for task, ratio in now.items()}
        mean = sum(now.values()) / len(now)
        records.append({"kind": "validation", "step": number * every, "mean_ratio": mean, "loss": 2 * mean, "tasks": tasks})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    values = {task: numbers[best // every] for task, numbers in ratios.items()}
    (folder / "best.json").write_text(json.dumps({"step": best, "criterion": "mean_ratio", "value": 0.0, "values": values}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"data": {"tasks": [{"name": task} for task in ratios]}, **config}), encoding="utf-8")
    if trained is not None:
        (folder / "environment.json").write_text(json.dumps({"parameters": {"total": 10**9, "trainable": trained}}), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, *arguments, **more: write_run(tmp_path / name, *arguments, **more)
