"""The two slope estimators on data with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mftcoder_coba.balancing.coba import ols_slopes, paired_slopes

TRUE = np.array([-3e-3, 2e-3, -1e-5])  # slopes per step
seeds = st.integers(0, 2**32 - 1)
many = settings(deadline=None, derandomize=True, max_examples=60)


def lines(rng, count=40):
    """Uneven steps, and a noise-free line for each task."""
    steps = 1000 + np.cumsum(rng.integers(1, 9, count))
    return steps, rng.uniform(0.5, 2.0, 3) + (steps[:, None] - 1000) * TRUE


def with_gaps(rng, ratios, part):
    return np.where(rng.random(ratios.shape) < part, np.nan, ratios)


@given(seeds)
@many
def test_missing_observations_do_not_change_the_slope_of_a_line(seed):
    rng = np.random.default_rng(seed)
    steps, ratios = lines(rng)
    ratios = with_gaps(rng, ratios, 0.8)
    assume((np.count_nonzero(~np.isnan(ratios), axis=0) >= 2).all())
    np.testing.assert_allclose(ols_slopes(steps, ratios), TRUE, rtol=0, atol=1e-14)


@given(seeds)
@many
def test_on_a_line_plus_an_offset_per_slot_the_paired_slope_is_exact_and_the_plain_one_is_not(seed):
    rng = np.random.default_rng(seed)
    steps, ratios = lines(rng)
    slots = np.arange(40)[:, None] % [20, 7, 3]
    ratios = ratios + rng.normal(0, 0.1, (20, 3))[slots, np.arange(3)]
    np.testing.assert_allclose(paired_slopes(steps, ratios, slots), TRUE, rtol=0, atol=1e-12)
    assert np.abs(ols_slopes(steps, ratios) - TRUE).max() > 1e-7


@given(seeds)
@many
def test_the_paired_slope_stays_exact_where_observations_are_missing(seed):
    rng = np.random.default_rng(seed)
    steps, ratios = lines(rng)
    slots = np.arange(40)[:, None] % [20, 7, 3]
    ratios = with_gaps(rng, ratios + np.sin(slots * 5.0), 0.3)  # any offset that depends on the slot alone
    np.testing.assert_allclose(paired_slopes(steps, ratios, slots), TRUE, rtol=0, atol=1e-12)


@given(seeds, st.floats(0.0, 0.7))
@many
def test_with_a_single_slot_both_estimators_agree(seed, missing):
    rng = np.random.default_rng(seed)
    steps, ratios = lines(rng)
    ratios = with_gaps(rng, ratios + rng.normal(0, 0.1, ratios.shape), missing)
    np.testing.assert_allclose(paired_slopes(steps, ratios, np.full((40, 3), 2)), ols_slopes(steps, ratios), rtol=0, atol=1e-13)


def test_undefined_slopes_are_zero():
    steps, nan = np.array([3, 6]), np.nan
    ratios = np.array([[nan, 0.9, 0.9], [nan, nan, 0.7]])
    assert ols_slopes(steps, ratios).tolist()[:2] == [0.0, 0.0]
    assert ols_slopes(steps, ratios)[2] == pytest.approx(-0.2 / 3)
    assert paired_slopes(steps, ratios, np.array([[0, 0, 0], [1, 1, 1]])).tolist() == [0.0, 0.0, 0.0]


def test_a_task_with_missing_observations_leaves_the_slopes_of_the_others_as_they_are():
    rng = np.random.default_rng(9)
    steps, ratios = lines(rng)
    ratios += rng.normal(0, 0.1, ratios.shape)
    gaps = ratios.copy()
    gaps[::3, 1] = np.nan
    slots = np.arange(40)[:, None] % [5, 5, 5]
    for slopes in (ols_slopes(steps, ratios) - ols_slopes(steps, gaps), paired_slopes(steps, ratios, slots) - paired_slopes(steps, gaps, slots)):
        assert np.abs(slopes[[0, 2]]).max() < 1e-15 < np.abs(slopes[1])
