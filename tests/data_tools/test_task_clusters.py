"""data_tools.task_clusters: affinities without sampling noise, and clusters that are found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.task_clusters import LEAST_SELF, Clusters, cosines, divide, propose, separation, silhouette, without_noise
from data_tools.task_gradients import inner_products


def blocks(labels: list[int], within: float, between: float) -> np.ndarray:
    affinity = np.where(np.equal.outer(labels, labels), within, between)
    np.fill_diagonal(affinity, 1.0)
    return affinity


def random_affinity(tasks: int, seed: int) -> np.ndarray:
    """Cosines of random vectors around a few centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(3, 6))[rng.integers(0, 3, tasks)] + rng.normal(size=(tasks, 6)) * rng.uniform(0.1, 1.5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 1, 1, 0], [0, 1, 1, 2, 0, 2, 2], [0, 0, 0, 1], [0, 1, 2, 2]])
@pytest.mark.parametrize("number", [None, "as it is"])
def test_a_matrix_of_blocks_is_divided_into_its_blocks(labels, number):
    found = propose(blocks(labels, 0.8, 0.1), None if number is None else max(labels) + 1)
    assert list(found.labels) == labels


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.data())
def test_another_order_of_the_tasks_gives_the_same_clusters(tasks, seed, data):
    affinity, order = random_affinity(tasks, seed), data.draw(st.permutations(range(tasks)))
    names = [f"task{task}" for task in range(tasks)]
    here = propose(affinity).named(names)
    there = propose(affinity[np.ix_(order, order)]).named([names[task] for task in order])
    assert {frozenset(members) for members in here.values()} == {frozenset(members) for members in there.values()}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.data())
def test_there_are_as_many_clusters_as_asked_for(tasks, seed, data):
    number = data.draw(st.integers(1, tasks))
    labels = propose(random_affinity(tasks, seed), number).labels
    assert len(labels) == tasks and sorted(set(labels)) == list(range(number))
    assert [labels.index(label) for label in range(number)] == sorted(labels.index(label) for label in range(number))


@pytest.mark.parametrize("number", range(1, 7))
def test_ties_do_not_change_the_number_of_clusters(number):
    assert len(set(divide(blocks([0] * 6, 0.4, 0.4), number))) == number


def test_clusters_join_by_the_mean_of_their_distances():
    # d joins {a, b, c} or e: single linkage would take the first (0.35 from c), complete and average linkage the second.
    distances = np.zeros((5, 5))
    for pair, value in {"ab": 0.1, "ac": 0.15, "bc": 0.15, "ad": 0.9, "bd": 0.9, "cd": 0.35, "ae": 0.95, "be": 0.95, "ce": 0.95, "de": 0.5}.items():
        one, other = ("abcde".index(letter) for letter in pair)
        distances[one, other] = distances[other, one] = value
    assert divide(1.0 - distances, 2) == (0, 0, 0, 1, 1)
    # e is moved away from d, beyond the mean distance (0.9 + 0.9 + 0.35) / 3 = 0.717 of d to the others.
    distances[3, 4] = distances[4, 3] = 0.72
    assert divide(1.0 - distances, 2) == (0, 0, 0, 0, 1)


def test_the_silhouette_is_the_mean_over_tasks_and_0_for_a_task_alone():
    affinity = np.array([[1.0, 0.8, 0.5], [0.8, 1.0, 0.3], [0.5, 0.3, 1.0]])
    assert silhouette(affinity, (0, 0, 1)) == pytest.approx(((0.5 - 0.2) / 0.5 + (0.7 - 0.2) / 0.7 + 0.0) / 3)
    assert silhouette(affinity, (0, 1, 0)) == pytest.approx(((0.2 - 0.5) / 0.5 + 0.0 + (0.7 - 0.5) / 0.7) / 3)
    assert silhouette(np.ones((4, 4)), (0, 0, 1, 1)) == 0.0
    # Of several other clusters the nearest counts.
    assert silhouette(blocks([0, 0, 1, 1, 2, 2], 0.9, 0.4), (0, 0, 1, 1, 2, 2)) == pytest.approx((0.6 - 0.1) / 0.6)


def test_separation_is_the_mean_affinity_of_pairs():
    within, between = separation(blocks([0, 0, 1, 1, 1], 0.8, 0.1), (0, 0, 1, 1, 1))
    assert (within, between) == (pytest.approx(0.8), pytest.approx(0.1))
    assert np.isnan(separation(np.eye(3), (0, 1, 2))[0]) and np.isnan(separation(np.eye(3), (0, 0, 0))[1])


@pytest.mark.parametrize(("within", "between"), [(0.5, 0.5), (0.0, 0.0), (0.55, 0.5), (0.99, 0.95)])
def test_where_nothing_separates_there_is_one_cluster(within, between):
    found = propose(blocks([0, 0, 0, 1, 1], within, between))
    assert set(found.labels) == {0} and "nothing separates" in found.reason


@pytest.mark.parametrize(("affinity", "labels"), [(0.49, (0, 1)), (0.5, (0, 0)), (-0.9, (0, 1))])
def test_two_tasks_go_together_where_they_agree(affinity, labels):
    assert propose(blocks([0, 1], 1.0, affinity)).labels == labels
    assert propose(blocks([0, 1], 1.0, affinity), 1).labels == (0, 0) and propose(blocks([0, 1], 1.0, affinity), 2).labels == (0, 1)


def test_one_task_is_one_cluster():
    assert propose(np.ones((1, 1))).labels == propose(np.ones((1, 1)), 1).labels == (0,)


def test_clusters_have_numbers_and_keep_the_order_of_the_config():
    assert Clusters((0, 1, 0), "", {}).named(["b", "c", "a"]) == {"cluster1": ["b", "a"], "cluster2": ["c"]}


def test_cosines_follow_from_the_inner_products_of_the_halves():
    halves = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, -3.0, 1.0]]])
    cosine, own = cosines(inner_products(halves))
    lengths = np.array([5.0, 3.0, np.sqrt(13.0)])
    expected = np.array([[25.0, 9.0, -12.0], [9.0, 9.0, 0.0], [-12.0, 0.0, 13.0]]) / np.outer(lengths, lengths)
    np.testing.assert_allclose(cosine, expected, atol=1e-12)
    np.testing.assert_allclose(own, [0.0, 1.0, 1 / np.sqrt(10)], atol=1e-12)


def test_inner_products_are_summed_over_parts_of_the_vectors(monkeypatch):
    monkeypatch.setattr("data_tools.task_gradients.PRODUCT_COLUMNS", 7)
    vectors = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("kan,lbn->kalb", vectors.double(), vectors.double())
    np.testing.assert_allclose(inner_products(vectors), expected.numpy(), rtol=1e-12)


def test_without_noise_the_cosine_stays():
    cosine = random_affinity(5, 1)
    np.testing.assert_allclose(without_noise(cosine, np.ones(5)), cosine)


def test_the_mean_affinity_is_that_of_the_gradients_below_the_noise():
    rng, width, draws = np.random.default_rng(0), 4000, 40
    directions = np.linalg.qr(rng.normal(size=(width, 3)))[0].T
    true = np.stack([directions[0], 0.8 * directions[0] + 0.6 * directions[1], -0.5 * directions[0] + np.sqrt(0.75) * directions[2]])
    lengths, noise = np.array([1.0, 3.0, 0.2]), np.array([1.0, 2.0, 0.25])  # of the mean; of the noise in a half
    raw, affinities = [], []
    for _ in range(draws):
        halves = lengths[:, None, None] * true[:, None] + noise[:, None, None] * rng.normal(size=(3, 2, width)) / np.sqrt(width)
        cosine, own = cosines(np.einsum("kan,lbn->kalb", halves, halves))
        raw.append(cosine)
        affinities.append(without_noise(cosine, own))
    error = np.std(affinities, axis=0) / np.sqrt(draws)
    assert (np.abs(np.mean(affinities, axis=0) - true @ true.T) <= 4 * error + 1e-12).all() and error.max() < 0.01
    assert np.mean(raw, axis=0)[0, 1] < 0.7 and np.mean(raw, axis=0)[0, 2] > -0.4  # 0.8 and -0.5 without noise


def test_a_task_whose_halves_disagree_is_corrected_by_no_more_than_a_bound():
    cosine = np.array([[1.0, 0.1], [0.1, 1.0]])
    most = 0.1 * (1 + LEAST_SELF) / (2 * LEAST_SELF)
    for own in (-1.0, -0.3, 0.0, LEAST_SELF):
        assert without_noise(cosine, np.array([own, own]))[0, 1] == pytest.approx(most)
    assert without_noise(np.array([[1.0, -0.9], [-0.9, 1.0]]), np.array([0.3, 0.3]))[0, 1] == -1.0
