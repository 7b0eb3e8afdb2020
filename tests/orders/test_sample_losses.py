"""Losses of single samples against the model's own logits, and against the losses of tasks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy import TASKS

from mftcoder_coba.config import load_config
from mftcoder_coba.data import TaskData
from mftcoder_coba.evaluation.loading import FoundModel, load, load_data
from mftcoder_coba.evaluation.losses import task_losses
from mftcoder_coba.evaluation.sample_losses import choose_samples, sample_losses


@pytest.fixture(scope="module")
def loaded(toy):
    """(config, model, training data) of the toy experiment before training; several samples share a row."""
    config = load_config(toy / "toy.json")
    base = FoundModel(config, Path(config.model.path), None)
    return config, load(base, list(TASKS)), load_data(base, list(TASKS), "train")


def by_logits(model, data: TaskData, sample: int) -> float:
    """The mean token loss of a sample alone, in float64 from the model's own logits."""
    ids, mask = data.sample(sample)
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return losses[torch.from_numpy(mask[1:].copy())].mean().item()


def test_each_sample_has_the_loss_of_the_model_s_own_logits_on_it_alone(loaded):
    config, model, data = loaded
    samples = choose_samples(data.splits, 40, 0)
    found = sample_losses(model, data, samples, config, 2)
    assert found == pytest.approx([by_logits(model, data.splits[task], sample) for task, sample in samples], rel=1e-6)


def test_samples_add_up_to_the_losses_of_the_tasks(loaded):
    config, model, data = loaded
    samples = choose_samples(data.splits, 10**6, 0)
    assert len(samples) == sum(TASKS.values())
    losses, tasks = sample_losses(model, data, samples, config, 4), task_losses(model, data, config, 4)
    tokens = np.array([data.splits[task].supervised[sample] for task, sample in samples])
    for number, task in enumerate(TASKS):
        own = np.array([owner == number for owner, _ in samples])
        assert tokens[own].sum() == tasks[task]["tokens"]
        assert np.average(losses[own], weights=tokens[own]) == pytest.approx(tasks[task]["loss"], rel=1e-6)


def test_losses_do_not_depend_on_the_others_nor_on_their_order(loaded):
    config, model, data = loaded
    samples = choose_samples(data.splits, 30, 0)
    few = sample_losses(model, data, samples[4::-1], config, 1)
    assert few == pytest.approx(sample_losses(model, data, samples, config, 4)[4::-1], rel=1e-6)


def split(size: int, without: int = 0) -> TaskData:
    ids = np.arange(4, dtype=np.int32)
    return TaskData.from_samples([(ids, np.full(4, number >= without)) for number in range(size)])


def test_samples_are_spread_over_tasks_by_size():
    splits = [split(100), split(40), split(10)]
    chosen = choose_samples(splits, 30, 5)
    assert len(set(chosen)) == 30
    assert [sum(task == number for task, _ in chosen) for number in range(3)] == [20, 8, 2]
    assert choose_samples(splits, 60, 5)[:30] == chosen and choose_samples(splits, 30, 6) != chosen
    assert choose_samples(splits, 0, 5) == []


def test_what_has_no_supervised_tokens_is_not_chosen():
    assert sorted(choose_samples([split(5, without=2)], 9, 0)) == [(0, 2), (0, 3), (0, 4)]
