"""`random` against its formula and against torchjd's."""

from __future__ import annotations

import numpy as np
import pytest

from mftcoder_coba.balancing import create
from mftcoder_coba.config import RandomConfig

TASKS = ["a", "b", "c", "d"]
UNUSED = np.ones(4)


def drawn(seed, steps):
    """Weights of the first steps, [T, K]."""
    balancer = create(RandomConfig(kind="random", seed=seed), TASKS, 0)
    return np.array([balancer.weights(UNUSED) for _ in range(steps)])


def test_the_logarithms_of_the_weights_are_standard_normal_up_to_one_number_per_step():
    logits = np.log(drawn(0, 4000))
    centred = logits - logits.mean(axis=1, keepdims=True)  # variance 1 - 1 / K, covariance - 1 / K
    np.testing.assert_allclose(np.cov(centred.T), np.eye(4) - 0.25, rtol=0, atol=0.06)
    np.testing.assert_allclose(centred.mean(axis=0), 0, rtol=0, atol=0.06)


def test_each_step_and_each_seed_has_numbers_of_its_own():
    weights = np.concatenate([drawn(0, 50), drawn(1, 50)])
    assert len(np.unique(weights[:, 0])) == 100


def test_a_step_draws_the_same_whether_the_run_was_resumed_before_it_or_not():
    balancer = create(RandomConfig(kind="random", seed=7), TASKS, 0)
    state = {"kind": "random", "tasks": TASKS, "step": 41}
    balancer.load_state_dict(state)
    unbroken = drawn(7, 42)
    assert list(balancer.record()["tasks"]["a"].values()) == [unbroken[40, 0]]  # given last
    assert balancer.weights(UNUSED).tolist() == unbroken[41].tolist()


def test_from_the_same_normal_numbers_torchjd_makes_the_same_weights(monkeypatch):
    torchjd = pytest.importorskip("torchjd.scalarization", reason="torchjd is the independent reference; requirements.txt has it")
    import torch

    for step, weights in enumerate(drawn(3, 60), start=1):
        numbers = torch.from_numpy(np.random.default_rng((3, step)).standard_normal(4))
        monkeypatch.setattr(torch, "randn", lambda *shape, numbers=numbers, **options: numbers)
        values = torch.ones(4, dtype=torch.float64, requires_grad=True)
        torchjd.Random()(values).backward()
        np.testing.assert_allclose(weights, values.grad.numpy(), rtol=0, atol=1e-12)
