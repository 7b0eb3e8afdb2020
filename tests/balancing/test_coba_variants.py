"""CoBa's other forms: the official repository's formula against a literal one, and the parts alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mftcoder_coba.balancing import Signals, create, resolve
from mftcoder_coba.config import CobaConfig
from mftcoder_coba.errors import UserError


def literal_softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def fit(values):
    """The slope over 0, 1, 2, ... of the values that are there."""
    there = [value for value in values if not math.isnan(value)]
    return np.polyfit(range(len(there)), there, 1)[0] if len(there) > 1 else 0.0


def official(ratios, *, window, warmup, tau, interval=1):
    """Weights after each observation of `ratios` [T, K], by the repository's own bookkeeping: it counts steps from 0, measures
    from after the second on, keeps all measurements, and cuts both lists by the number of the step."""
    tasks = len(ratios[0])
    history, slopes, totals, weights = [], [], [], []
    for observation, row in enumerate(ratios, start=1):
        done = observation * interval  # optimizer steps
        start = max(0, observation - window)
        if observation > 1:
            history.append(row)
        if observation < warmup:
            weights.append([1 / tasks] * tasks)
            continue
        kept = history[-len(range(start, done)) :]
        slopes.append([fit([past[k] for past in kept]) for k in range(tasks)])
        totals.append(fit([max((value for value in past if not math.isnan(value)), default=math.nan) for past in kept]))
        now = slopes[-1]
        relative = literal_softmax([tasks * slope / sum(map(abs, now)) for slope in now])
        listed = slopes[start:]
        absolute = literal_softmax([-len(listed) * now[k] / (sum(abs(past[k]) for past in listed) or 1.0) for k in range(tasks)])
        m = len(totals)
        factor = m * literal_softmax([-tau * m * total / sum(map(abs, totals)) for total in totals])[-1]
        once = [factor * r + (1 - factor) * a for r, a in zip(relative, absolute, strict=True)]
        twice = literal_softmax([tasks * value for value in once])
        floor = 1 / (10 * tasks)
        weights.append([w * (1 - floor * tasks) + floor for w in twice] if min(twice) < floor else twice)
    return np.array(weights)


def random_walks(seed, count=90, missing=0.0):
    """Initial losses [4], and losses [T, 4] that drift down noisily."""
    rng = np.random.default_rng(seed)
    initial = rng.uniform(0.5, 4.0, 4)
    losses = initial * np.exp(np.cumsum(rng.normal(-0.004, 0.02, (count, 4)), axis=0))
    losses[rng.random(losses.shape) < missing] = np.nan
    return initial, losses


def run(initial, losses, interval=1, **settings):
    """(weights [T, K] after each observation, the last record)."""
    balancer = create(CobaConfig(kind="coba", update_interval=interval, **settings), [f"t{k}" for k in range(len(initial))], coverage=1)
    balancer.start(initial)
    weights = []
    for t, row in enumerate(losses, start=1):
        balancer.observe(Signals(t * interval, validation_losses=row))
        weights.append(balancer.weights(np.ones(len(initial))))
    return np.array(weights), balancer.record()


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(("window", "warmup", "tau"), [(16, 8, 5.0), (30, 4, 0.7), (9, 9, 2.0)])
def test_the_variant_gives_the_weights_of_the_repositorys_bookkeeping(missing, interval, window, warmup, tau):
    initial, losses = random_walks(window, missing=missing)
    settings = {"window": window, "warmup": warmup, "tau": tau}
    got, _ = run(initial, losses, interval, variant="mftcoder", **settings)
    np.testing.assert_allclose(got, official(losses / initial, interval=interval, **settings), rtol=0, atol=1e-9)


def test_the_variant_keeps_every_weight_at_or_above_a_tenth_of_the_uniform_one_after_rescaling():
    initial, losses = random_walks(1, count=200)
    got, _ = run(initial, losses, variant="mftcoder", window=20, warmup=10)
    assert got.min() >= 1 / 40 and got.min() < 1 / 30  # the floor was needed
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=0, atol=1e-12)


def test_the_variants_divergence_factor_is_of_the_largest_ratio_and_may_exceed_one():
    # b, the task with the largest ratio, falls ever faster; a, with the largest slope, rises far below it.
    t = np.arange(1, 41)
    losses = np.array([0.1 + 1e-4 * t, 2 - 4e-4 * t**2]).T
    _, shown = run(np.ones(2), losses, variant="mftcoder", window=10, warmup=5)
    assert shown["alpha_max"] == pytest.approx(shown["tasks"]["t1"]["slope"]) and shown["alpha_max"] < 0 < shown["tasks"]["t0"]["slope"]
    assert shown["df"] > 1


def test_the_variant_gives_uniform_weights_for_losses_that_do_not_move():
    got, shown = run(np.ones(3), np.full((20, 3), 0.7), variant="mftcoder", window=6, warmup=3)
    np.testing.assert_allclose(got, 1 / 3, rtol=1e-14)
    assert shown["df"] == 1.0


@pytest.mark.parametrize(("settings", "where"), [({"window": 4, "warmup": 5}, "balancer.window"), ({"df_history": "all"}, "balancer.df_history")])
def test_settings_that_the_repositorys_formula_does_not_have_are_refused(settings, where):
    with pytest.raises(UserError) as refused:
        resolve(CobaConfig(kind="coba", variant="mftcoder", **settings), 4)
    assert refused.value.where == where


@pytest.mark.parametrize(
    ("scores", "blend"),
    [
        (["rcs"], lambda rcs, acs, df: rcs),
        (["acs"], lambda rcs, acs, df: acs),
        (["acs", "rcs"], lambda rcs, acs, df: (rcs + acs) / 2),
        (["df", "acs", "rcs"], lambda rcs, acs, df: df * rcs + (1 - df) * acs),
    ],
    ids=["rcs", "acs", "rcs+acs", "all"],
)
@pytest.mark.parametrize("slope", ["ols", "paired"])
def test_the_scores_that_are_named_make_the_weights(scores, blend, slope):
    initial, losses = random_walks(2)
    balancer = create(CobaConfig(kind="coba", window=16, warmup=8, scores=scores, slope=slope), ["a", "b", "c", "d"], coverage=4)
    balancer.start(initial)
    for t, row in enumerate(losses, start=1):
        balancer.observe(Signals(t, validation_losses=row, slots=np.full(4, t % 4)))
        rcs, acs, got = (np.array([task[name] for task in balancer.record()["tasks"].values()]) for name in ("rcs", "acs", "weight"))
        expected = blend(rcs, acs, balancer.record()["df"]) if t >= 8 else np.full(4, 0.25)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)
