"""Positions, excess, bins and correlations, against closed forms."""

import numpy as np
import pytest

from mftcoder_coba.data import TrainSchedule
from mftcoder_coba.orders.imbalance import binned_mean, excess_of, imbalance_of, positions_of, rank_correlation

ORDERS, SAMPLES = 4, 600


@pytest.fixture
def places() -> np.ndarray:
    """[orders, samples]: every sample at an independent place of each order."""
    rng = np.random.default_rng(0)
    return np.array([rng.permutation(SAMPLES) for _ in range(ORDERS)]) / SAMPLES


def hardness() -> np.ndarray:
    return np.random.default_rng(1).exponential(3.0, SAMPLES)


def test_a_bin_has_the_mean_of_the_values_in_it():
    positions, values = np.array([0.0, 0.24, 0.25, 0.99, np.nan, 0.6]), np.array([1.0, 3.0, 5.0, 7.0, 100.0, np.nan])
    np.testing.assert_array_equal(binned_mean(positions, values, 4), [2.0, 5.0, np.nan, 7.0])


def test_a_line_has_the_middles_of_the_bins():
    positions = np.arange(1000) / 1000
    np.testing.assert_allclose(binned_mean(positions, 3 - 2 * positions, 20), 3 - 2 * (np.arange(20) * 0.05 + 0.0245), atol=1e-12)


def test_the_excess_does_not_depend_on_how_hard_samples_are(places):
    seen = 0.3 * (1 - places)
    with_hardness = seen + hardness()
    np.testing.assert_allclose(excess_of(with_hardness, with_hardness), excess_of(seen, seen), atol=1e-12)
    # Over all orders it cancels, sample by sample.
    np.testing.assert_allclose(excess_of(with_hardness, with_hardness).sum(axis=0), 0, atol=1e-12)


def test_the_excess_is_the_effect_of_the_place_minus_its_mean_in_the_other_orders(places):
    losses = places**2 + hardness()
    others = (places**2).sum(axis=0) - places**2
    np.testing.assert_allclose(excess_of(losses, losses), places**2 - others / (ORDERS - 1), atol=1e-12)


def test_correlations_find_the_imbalance_that_hardness_hides(places):
    losses = 0.3 * (1 - places) + hardness()
    found = imbalance_of(losses, losses, places)
    assert (abs(found.loss_correlation) < 0.2).all()
    assert (found.excess_correlation < -0.7).all()
    # Its mean over samples of a bin is 0.3 (1 - p) minus the others' mean, 0.15, up to their scatter.
    middles = (np.arange(20) + 0.5) / 20
    np.testing.assert_allclose(found.excess, 0.15 - 0.3 * middles, atol=0.03)


def test_without_imbalance_there_is_no_correlation_with_the_excess(places):
    losses = hardness() + 0.1 * np.random.default_rng(2).standard_normal((ORDERS, SAMPLES))
    assert (abs(imbalance_of(losses, losses, places).excess_correlation) < 0.15).all()


def test_one_model_is_looked_at_in_every_order(places):
    losses = 0.3 * (1 - places) + hardness()
    merged = hardness() + 1.0
    found = imbalance_of(merged, losses, places)
    by_hand = np.mean([binned_mean(places[k], merged - np.delete(losses, k, axis=0).mean(axis=0)) for k in range(ORDERS)], axis=0)
    np.testing.assert_allclose(found.excess, by_hand, atol=1e-12)
    np.testing.assert_allclose(found.loss, np.mean([binned_mean(place, merged) for place in places], axis=0), atol=1e-12)
    assert found.loss_correlation.shape == found.excess_correlation.shape == (ORDERS,)


def test_one_order_has_no_excess(places):
    found = imbalance_of(hardness()[None], hardness()[None], places[:1])
    assert np.isnan(found.excess).all() and np.isnan(found.excess_correlation).all() and np.isfinite(found.loss).all()


def test_the_rank_correlation_is_of_ranks():
    positions = np.array([0.1, 0.2, 0.3, 0.4, np.nan])
    assert rank_correlation(positions, np.array([1.0, 2.0, 50.0, 1000.0, -9.0])) == pytest.approx(1.0)
    # Ranks 1 2 3 4 and 4 1 2 3: 1 - 6 (9 + 1 + 1 + 1) / (4 x 15).
    assert rank_correlation(positions, np.array([9.0, 1.0, 2.0, 3.0, np.nan])) == pytest.approx(-0.2)
    assert np.isnan(rank_correlation(positions, np.ones(5))) and np.isnan(rank_correlation(positions[:2], np.arange(2.0)))


def test_a_position_is_the_row_of_the_first_epoch():
    schedule = TrainSchedule([np.full(6, 4), np.full(2, 4)], None, 3, 8, "best_fit")
    epoch = schedule.epoch(0)
    samples = [(0, sample) for sample in range(6)] + [(1, 0), (1, 1)]
    found = positions_of(epoch, samples)
    for sample, position in zip(samples, found, strict=True):
        assert sample in epoch.row(round(position * len(epoch)))
    assert found.min() == 0 and found.max() == (len(epoch) - 1) / len(epoch) and len(epoch) == 4


def test_with_shares_a_sample_may_come_twice_or_not_at_all():
    schedule = TrainSchedule([np.full(10, 4), np.full(2, 4)], [1.0, 1.0], 3, 4, "none")
    epoch = schedule.epoch(0)  # six of each task, one a row
    found = positions_of(epoch, [(0, sample) for sample in range(10)] + [(1, 0), (1, 1)])
    assert np.isnan(found[:10]).sum() == 4
    places = np.flatnonzero((epoch.tasks == 1) & (epoch.samples == 0))
    assert len(places) == 3 and found[10] == places[0] / 12
