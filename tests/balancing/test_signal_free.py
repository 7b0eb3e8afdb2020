"""Uniform, fixed and proportional weights."""

from __future__ import annotations

import numpy as np
import pytest

from mftcoder_coba.balancing import Signals, create, resolve
from mftcoder_coba.config import CobaConfig, FixedConfig, ProportionalConfig, UniformConfig

COUNTS = np.array([10, 0, 30, 40])
TASKS = ["a", "b", "c", "d"]
FIXED = FixedConfig(kind="fixed", weights={"d": 1.0, "c": 2.0, "b": 3.0, "a": 4.0})
CONFIGS = [UniformConfig(kind="uniform"), ProportionalConfig(kind="proportional"), FIXED]


def weights(config, counts=COUNTS):
    return create(config, TASKS, coverage=0).weights(counts).tolist()


def test_uniform_weights_are_equal():
    assert weights(CONFIGS[0]) == [0.25] * 4


def test_proportional_weights_follow_the_denominators_of_the_step():
    assert weights(CONFIGS[1]) == [0.125, 0.0, 0.375, 0.5]


def test_proportional_weights_of_an_empty_batch_are_finite_and_sum_to_one():
    assert weights(CONFIGS[1], np.zeros(4)) == [0.25] * 4


def test_fixed_weights_are_scaled_to_sum_to_one_and_go_by_name():
    assert weights(FIXED) == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_they_want_no_signal_and_need_no_validation_data(config):
    balancer = create(config, TASKS, coverage=0)
    assert resolve(config, 0) == config
    assert balancer.signals == frozenset() and not any(balancer.wants(step) for step in range(1, 9))
    with pytest.raises(ValueError, match="no observations"):
        balancer.observe(Signals(1, validation_losses=np.ones(4)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_their_record_shows_the_weights_that_were_given_last(config):
    balancer = create(config, TASKS, coverage=0)
    given = balancer.weights(COUNTS)
    shown = given.tolist()
    given[:] = 9.0
    assert [task["weight"] for task in balancer.record()["tasks"].values()] == shown
    assert list(balancer.record()["tasks"]) == TASKS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_restored_they_give_the_same_weights(config):
    balancer, restored = create(config, TASKS, 0), create(config, TASKS, 0)
    balancer.weights(np.array([1, 1, 1, 1]))
    restored.load_state_dict(balancer.state_dict())
    assert restored.weights(COUNTS).tolist() == balancer.weights(COUNTS).tolist()


def test_every_declared_signal_is_a_field_of_signals():
    declared = create(CobaConfig(kind="coba"), TASKS, 4).signals
    assert declared == {"validation_losses"} and declared <= set(Signals.__dataclass_fields__)
