"""What holds for CoBa's weights and slopes whatever the losses are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.config import CobaConfig

UNUSED = np.ones(1)  # CoBa's weights do not depend on the step's denominators


def coba(tasks, initial=None, coverage=4, **config):
    balancer = create(CobaConfig(kind="coba", **config), [f"t{k}" for k in range(tasks)], coverage)
    balancer.start(np.ones(tasks) if initial is None else np.asarray(initial))
    return balancer


def feed(balancer, losses, slots=None, first=1):
    """Observes losses [T, K] and returns the weights after each, [T, K]."""
    result = []
    for i, row in enumerate(np.asarray(losses)):
        slot = np.zeros(len(row), int) if slots is None else np.asarray(slots)[i]
        balancer.observe(Signals(first + i, validation_losses=row, slots=slot))
        result.append(balancer.weights(UNUSED))
    return np.array(result)


def walks(seed, tasks=3, count=60):
    return np.exp(np.cumsum(np.random.default_rng(seed).normal(-0.005, 0.02, (count, tasks)), axis=0))


def column(record, name):
    return [task[name] for task in record["tasks"].values()]


usual = st.floats(0.0, 10.0)
strange = st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e-8, 1e99, 1e150, 1.7e308, math.nan, math.inf, -math.inf])


@st.composite
def runs(draw):
    tasks, count = draw(st.integers(1, 5)), draw(st.integers(1, 25))
    loss = draw(st.sampled_from([usual, strange, usual | strange]))
    rows = st.lists(loss, min_size=tasks, max_size=tasks)
    initial = draw(st.lists(st.floats(5e-324, 1.7e308), min_size=tasks, max_size=tasks))
    slots = st.lists(st.integers(0, 3), min_size=tasks, max_size=tasks)
    pairs = draw(st.lists(st.tuples(rows, slots), min_size=count, max_size=count))
    config = {
        "window": draw(st.integers(2, 12)),
        "warmup": draw(st.integers(1, 6)),
        "tau": draw(st.floats(0.01, 1e4)),
        "slope": draw(st.sampled_from(["ols", "paired"])),
        "df_history": draw(st.sampled_from(["warmup", "all"])),
    }
    return initial, [pair[0] for pair in pairs], [pair[1] for pair in pairs], config


@pytest.mark.filterwarnings("error")
@given(runs())
@settings(deadline=None, derandomize=True, max_examples=120)
def test_weights_are_positive_and_sum_to_one_whatever_is_observed(run):
    initial, losses, slots, config = run
    weights = feed(coba(len(initial), initial, coverage=1, **config), losses, slots)
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)


def test_a_weight_too_small_for_float64_stays_positive():
    """One slope is 0 for long and then huge: n = 800 in its ACS and m = 900 in DF push both below float64."""
    losses = np.ones((1000, 2))
    losses[:, 1] -= np.arange(1000) * 5e-4
    losses[-1, 0] = 1e9
    weights = feed(coba(2, window=800, warmup=100), losses)
    assert 0 < weights[-1, 0] < 1e-300


@pytest.mark.filterwarnings("error")
def test_a_ratio_whose_sums_would_leave_float64_counts_as_missing():
    losses = walks(8, count=20)
    with_huge, with_gaps = losses.copy(), losses.copy()
    with_huge[5:15, 0] = 1e307
    with_gaps[5:15, 0] = np.nan
    np.testing.assert_array_equal(feed(coba(3), with_huge), feed(coba(3), with_gaps))


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_w_observed_steps_train_with_uniform_weights_and_the_next_one_does_not(every):
    balancer = coba(3, window=10, warmup=5, update_interval=every)
    used = []  # by steps 1, 2, ...
    for step in range(1, 8 * every):
        used.append(balancer.weights(UNUSED))
        if balancer.wants(step):
            balancer.observe(Signals(step, validation_losses=walks(1)[step]))
    assert all((weights == 1 / 3).all() for weights in used[: 5 * every])
    assert all((weights != 1 / 3).all() for weights in used[5 * every :])


def test_observations_are_wanted_at_multiples_of_the_update_interval():
    balancer = coba(2, update_interval=4)
    assert [step for step in range(1, 14) if balancer.wants(step)] == [4, 8, 12]


@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_identical_tasks_stay_uniform(slope):
    losses = np.repeat(walks(2, tasks=1), 5, axis=1)
    slots = np.arange(60)[:, None] % 4 * np.ones((1, 5), int)
    np.testing.assert_allclose(feed(coba(5, slope=slope), losses, slots), 0.2, rtol=1e-14)


@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_constant_losses_give_exactly_uniform_scores_and_a_divergence_factor_of_one(slope):
    initial = np.array([0.3, 0.7, 1.9])
    balancer = coba(3, initial, slope=slope, window=20)
    feed(balancer, np.tile(initial * 0.9, (50, 1)), np.arange(50)[:, None] % 4 * np.ones((1, 3), int))
    record = balancer.record()
    assert column(record, "slope") == [0.0] * 3
    assert column(record, "rcs") == column(record, "acs") == column(record, "weight") == [1 / 3] * 3
    assert record["df"] == 1.0


@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_scaling_the_losses_of_one_task_changes_nothing(slope):
    losses, scale = walks(3), np.array([1.0, 7.3, 1e-4])
    slots = np.arange(60)[:, None] % [4, 3, 2]
    got = feed(coba(3, scale, slope=slope), losses * scale, slots)
    np.testing.assert_allclose(got, feed(coba(3, slope=slope), losses, slots), rtol=1e-9)


@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_weights_follow_a_permutation_of_the_tasks(slope):
    losses, slots, order = walks(4, tasks=4), np.arange(60)[:, None] % [4, 3, 2, 4], [2, 0, 3, 1]
    got = feed(coba(4, slope=slope), losses[:, order], slots[:, order])
    np.testing.assert_allclose(got, feed(coba(4, slope=slope), losses, slots)[:, order], rtol=1e-12)


def test_c1_the_slower_task_gains():
    t = np.arange(1, 151)[:, None]
    weights = feed(coba(3, window=40, warmup=20), 0.3 + 0.7 * np.exp(-t / np.array([60.0, 120.0, 240.0])))
    after = weights[25:]
    assert (after[:, 2] > after[:, 1]).all() and (after[:, 1] > after[:, 0]).all()
    assert (after[:, 2] > 1 / 3).all() and (after[:, 0] < 1 / 3).all()


def test_c2_a_task_that_turns_up_after_common_descent_falls_below_uniform():
    t = np.arange(1, 301)
    steady = 0.4 + 0.6 * np.exp(-t / 100)
    losses = np.stack([steady, steady + 0.002 * np.maximum(0, t - 150), steady], axis=1)
    weights = feed(coba(3, window=40, warmup=20), losses)
    np.testing.assert_allclose(weights[149], 1 / 3, rtol=1e-9)
    assert weights[-1, 1] < 0.1


@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_the_divergence_factor_is_one_for_constant_slopes(slope):
    """Paired slopes are first defined when a slot of the cycle of 4 returns, which is before the warm-up of 6 ends."""
    t = np.arange(1, 81)[:, None]
    balancer = coba(3, slope=slope, window=12, warmup=6)
    factors = []
    for i, losses in enumerate(1 - t * [0.001, 0.004, 0.002]):
        feed(balancer, [losses], [[i % 4] * 3], first=i + 1)
        factors.append(balancer.record()["df"])
    assert factors[:5] == [None] * 5
    assert factors[5:] == pytest.approx([1.0] * 75, abs=1e-9)
