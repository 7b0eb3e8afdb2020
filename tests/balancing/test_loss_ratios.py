"""`lbtw` and `dwa`: closed forms, missing losses, and torchjd's DWA."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.config import DwaConfig, LbtwConfig
from mftcoder_coba.errors import UserError

TASKS = ["a", "b", "c"]
UNUSED = np.ones(3)
NAN = math.nan


def lbtw(**config):
    return create(LbtwConfig(kind="lbtw", **config), TASKS, 1)


def dwa(**config):
    return create(DwaConfig(kind="dwa", **config), TASKS, 0)


def train(balancer, *rows):
    """Observes train losses and returns the weights after each row, [T, K]."""
    result = []
    for row in rows:
        balancer.observe(Signals(balancer.state_dict()["step"] + 1, train_losses=np.array(row)))
        result.append(balancer.weights(UNUSED))
    return np.array(result)


def softmax(*values):
    return np.exp(values) / np.exp(values).sum()


def column(balancer, name):
    return [task[name] for task in balancer.record()["tasks"].values()]


def test_lbtw_weighs_by_the_power_of_the_loss_over_the_first_one():
    weights = train(lbtw(), [4.0, 2.0, 1.0], [1.0, 2.0, 4.0])
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3], [0.5 / 3.5, 1 / 3.5, 2 / 3.5]], rtol=1e-14)
    np.testing.assert_allclose(train(lbtw(exponent=2.0), [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[1], [1 / 14, 4 / 14, 9 / 14], rtol=1e-14)


def test_lbtw_of_validation_losses_divides_by_those_before_training():
    balancer = lbtw(signal="validation", exponent=1.0)
    balancer.start(np.array([4.0, 2.0, 1.0]))
    balancer.observe(Signals(1, train_losses=np.array([9.0, 9.0, 9.0]), validation_losses=np.array([1.0, 1.0, 1.0])))
    np.testing.assert_allclose(balancer.weights(UNUSED), np.array([0.25, 0.5, 1.0]) / 1.75, rtol=1e-14)


def test_the_starred_lbtw_equals_the_plain_one_where_both_splits_coincide():
    losses = np.exp(np.cumsum(np.random.default_rng(0).normal(-0.01, 0.05, (40, 3)), axis=0))
    plain, starred = lbtw(), lbtw(signal="validation")
    starred.start(losses[0])
    for step, row in enumerate(losses, start=1):
        plain.observe(Signals(step, train_losses=row))
        starred.observe(Signals(step, validation_losses=row))
        assert plain.weights(UNUSED).tolist() == starred.weights(UNUSED).tolist()


def test_lbtw_keeps_the_last_ratio_of_an_absent_task_and_takes_one_for_a_task_never_seen():
    balancer = lbtw(exponent=1.0)
    weights = train(balancer, [2.0, NAN, 1.0], [1.0, NAN, NAN], [NAN, 8.0, NAN])
    np.testing.assert_allclose(weights[1], [0.2, 0.4, 0.4], rtol=1e-14)
    assert weights[2].tolist() == weights[1].tolist()  # the first loss of b is its own reference
    assert column(balancer, "ratio") == [0.5, 1.0, 1.0]


def test_lbtw_does_not_take_a_loss_of_zero_for_its_reference_and_gives_equal_weights_when_all_are_zero():
    weights = train(lbtw(exponent=1.0), [0.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    np.testing.assert_allclose(weights[:3], [[1 / 3] * 3, [1 / 3] * 3, [0.2, 0.4, 0.4]], rtol=1e-14)
    assert weights[3].tolist() == [1 / 3] * 3


def test_lbtw_of_validation_losses_refuses_a_loss_before_training_that_cannot_divide():
    with pytest.raises(UserError, match="task b.*lbtw"):
        lbtw(signal="validation").start(np.array([1.0, 0.0, 1.0]))
    lbtw().start(np.array([1.0, 0.0, NAN]))  # not looked at


def test_dwa_of_window_one_compares_the_last_two_losses():
    weights = train(dwa(window=1), [1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0])
    np.testing.assert_allclose(weights[0], 1 / 3, rtol=1e-14)
    np.testing.assert_allclose(weights[1], softmax(0.5, 0.25, 0.125), rtol=1e-14)
    np.testing.assert_allclose(weights[2], softmax(1.0, 0.5, 0.5), rtol=1e-14)


def test_dwa_compares_the_means_of_the_last_window_and_of_the_one_before():
    balancer = dwa(window=2, temperature=0.5)
    weights = train(balancer, [9.0, 9.0, 9.0], [1.0, 4.0, 2.0], [3.0, 4.0, 6.0], [1.0, 2.0, 1.0], [1.0, 2.0, 3.0])
    assert weights[2].tolist() == pytest.approx([1 / 3] * 3)
    np.testing.assert_allclose(weights[4], softmax(2 * 2 / 4, 2 * 4 / 8, 2 * 4 / 8), rtol=1e-14)
    assert column(balancer, "ratio") == [0.5, 0.5, 0.5]


def test_dwa_counts_a_tasks_own_observations_and_takes_one_until_both_windows_are_full():
    balancer = dwa(window=1)
    weights = train(balancer, [2.0, 2.0, 2.0], [NAN, 1.0, NAN], [1.0, NAN, NAN])
    np.testing.assert_allclose(weights[1], softmax(0.5, 0.25, 0.5), rtol=1e-14)
    np.testing.assert_allclose(weights[2], softmax(0.25, 0.25, 0.5), rtol=1e-14)
    assert column(balancer, "ratio") == [0.5, 0.5, None]


@pytest.mark.parametrize("window", [2, 4])
def test_a_dwa_restored_with_another_window_keeps_the_newest_losses(window):
    before, after, whole = dwa(window=3), dwa(window=window), dwa(window=window)
    rows = np.random.default_rng(1).uniform(1, 2, (14, 3)).tolist()
    train(before, *rows[:6])
    train(whole, *rows[:6])
    after.load_state_dict(before.state_dict())
    assert train(after, *rows[6:])[-1].tolist() == train(whole, *rows[6:])[-1].tolist()


@pytest.mark.parametrize("window", [1, 5])
def test_dwa_equals_torchjds_at_every_end_of_a_window(window):
    torchjd = pytest.importorskip("torchjd.scalarization", reason="torchjd is the independent reference; requirements.txt has it")
    import torch

    balancer, reference = dwa(window=window, temperature=1.5), torchjd.DWA(temperature=1.5)
    rows = np.exp(np.cumsum(np.random.default_rng(window).normal(-0.01, 0.1, (60, 3)), axis=0))
    ours = train(balancer, *rows)
    for t, row in enumerate(rows, start=1):
        reference(torch.from_numpy(row))
        if t % window == 0:
            reference.step()
            values = torch.ones(3, dtype=torch.float64, requires_grad=True)
            factors = torch.autograd.grad(copy.deepcopy(reference)(values), values)[0]  # a call adds to its history
            np.testing.assert_allclose(ours[t - 1], factors.numpy() / 3, rtol=0, atol=1e-12)
