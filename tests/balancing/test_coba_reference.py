"""CoBa against the worked case of the design and against a slow, literal implementation of its seven formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.config import CobaConfig


def reference(initial, observations, *, window, warmup, tau=5.0, df_history="warmup", slope="ols", absolute=True):
    """Weights after each of `observations` [(step, losses, slots)], in plain loops. `absolute` False leaves out the absolute value in D."""
    tasks = range(len(initial))
    slopes, worst, weights = [], [], []
    for t in range(1, len(observations) + 1):
        seen = observations[max(0, t - window) : t]
        fit = line_slope if slope == "ols" else slope_with_an_intercept_per_slot
        slopes.append([fit([(x, y[k] / initial[k], slot[k]) for x, y, slot in seen if not math.isnan(y[k])]) for k in tasks])
        a = slopes[-1]
        worst.append(max(a))
        n = min(window, t)
        total = sum(abs(value) for value in a)
        rcs = literal_softmax([len(a) * value / total if total else 0.0 for value in a])
        past = [sum(abs(row[k]) for row in slopes[-n:]) for k in tasks]
        acs = literal_softmax([-n * a[k] / past[k] if past[k] else 0.0 for k in tasks])
        first = warmup if df_history == "warmup" else 1
        history = worst[first - 1 :]
        m = t - first + 1
        d = sum(abs(value) if absolute else value for value in history)
        df = min(m * literal_softmax([-tau * m * value / d for value in history])[-1], 1.0) if history and d else 1.0
        weights.append([df * r + (1 - df) * s for r, s in zip(rcs, acs, strict=True)] if t >= warmup else [1 / len(a)] * len(a))
    return np.array(weights)


def literal_softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def line_slope(points):
    return np.polyfit([p[0] for p in points], [p[1] for p in points], 1)[0] if len(points) > 1 else 0.0


def slope_with_an_intercept_per_slot(points):
    slots = sorted({slot for _, _, slot in points})
    if len(slots) == len(points):  # no slot was seen twice
        return 0.0
    matrix = np.array([[x, *(float(slot == s) for s in slots)] for x, _, slot in points])
    return np.linalg.lstsq(matrix, np.array([y for _, y, _ in points]), rcond=None)[0][0]


def weights_of(initial, observations, **settings):
    """Weights after each observation, [T, K]."""
    balancer = create(CobaConfig(kind="coba", **settings), [f"t{k}" for k in range(len(initial))], coverage=1)
    balancer.start(np.array(initial))
    result = []
    for step, losses, slots in observations:
        balancer.observe(Signals(step, validation_losses=np.array(losses), slots=np.array(slots)))
        result.append(balancer.weights(np.ones(len(initial))))
    return np.array(result)


def random_walks(seed, tasks=4, count=90, every=1, missing=0.0):
    """Initial losses, and observations of losses that drift down noisily."""
    rng = np.random.default_rng(seed)
    initial = rng.uniform(0.5, 4.0, tasks)
    walks = initial * np.exp(np.cumsum(rng.normal(-0.004, 0.02, (count, tasks)), axis=0))
    walks[rng.random((count, tasks)) < missing] = np.nan
    cycles = rng.integers(2, 8, tasks)
    return initial, [(every * t, walks[t - 1], (t - 1) % cycles) for t in range(1, count + 1)]


def worked_case():
    """Task A converges, B overfits after step 300, C converges slowly."""
    a = [0.5 + 0.5 * math.exp(-t / 400) for t in range(1001)]
    b = [0.4 + 0.6 * math.exp(-t / 120) + 0.0004 * max(0, t - 300) for t in range(1001)]
    c = [0.3 + 0.7 * math.exp(-t / 900) for t in range(1001)]
    losses = np.array([a, b, c]).T
    return losses[0], [(t, losses[t], [0, 0, 0]) for t in range(1, 1001)]


@pytest.fixture(scope="module")
def worked_weights():
    return weights_of(*worked_case(), window=200, warmup=100)


@pytest.mark.parametrize(
    ("t", "expected"), [(250, [0.361, 0.210, 0.429]), (500, [0.419, 0.108, 0.473]), (1000, [0.435, 0.073, 0.492])], ids=["250", "500", "1000"]
)
def test_the_worked_case_comes_out_to_three_digits(worked_weights, t, expected):
    assert np.round(worked_weights[t - 1], 3).tolist() == expected


def test_the_overfitting_task_of_the_worked_case_gets_less_only_because_of_the_absolute_value(worked_weights):
    initial, observations = worked_case()
    printed = reference(initial, observations[4::5], window=40, warmup=20, absolute=False)  # every fifth step: the loops are slow
    assert worked_weights[-1].argmin() == 1 and worked_weights[-1, 1] < 0.08
    assert printed[-1].argmax() == 1 and printed[-1, 1] > 0.8


@pytest.mark.parametrize("slope", ["ols", "paired"])
@pytest.mark.parametrize("df_history", ["warmup", "all"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize(("window", "warmup", "tau"), [(16, 8, 5.0), (30, 1, 0.7), (9, 25, 2.0)])
def test_random_walks_give_the_weights_of_the_literal_formulas(slope, df_history, missing, window, warmup, tau):
    initial, observations = random_walks(seed=window, missing=missing)
    settings = {"window": window, "warmup": warmup, "tau": tau, "slope": slope, "df_history": df_history}
    np.testing.assert_allclose(weights_of(initial, observations, **settings), reference(initial, observations, **settings), rtol=0, atol=1e-9)


def test_with_an_update_interval_the_true_step_numbers_are_fitted():
    initial, observations = random_walks(seed=5, every=7)
    del observations[40:43]  # steps at which nothing could be observed
    settings = {"window": 12, "warmup": 6}
    got = weights_of(initial, observations, update_interval=7, **settings)
    np.testing.assert_allclose(got, reference(initial, observations, **settings), rtol=0, atol=1e-9)


def test_the_two_starts_of_the_divergence_factor_give_different_weights():
    initial, observations = random_walks(seed=6)
    literal = weights_of(initial, observations, window=16, warmup=8, df_history="all")
    ours = weights_of(initial, observations, window=16, warmup=8, df_history="warmup")
    assert np.abs(literal - ours)[8:].max() > 1e-3
