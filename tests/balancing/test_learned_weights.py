"""`uncertainty`, `famo` and their Adam: closed forms, missing losses, and torch and torchjd as references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.balancing.adam import adam_state, adam_step
from mftcoder_coba.config import FamoConfig, UncertaintyConfig

TASKS = ["a", "b", "c"]
UNUSED = np.ones(3)
NAN = math.nan
REASON = "torchjd is the independent reference; requirements.txt has it"


def uncertainty(**config):
    return create(UncertaintyConfig(kind="uncertainty", **config), TASKS, 0)


def famo(**config):
    balancer = create(FamoConfig(kind="famo", **config), TASKS, 1)
    balancer.start(np.array([1.0, 2.0, 4.0]))
    return balancer


def walks(seed, count=60):
    return np.exp(np.cumsum(np.random.default_rng(seed).normal(-0.01, 0.1, (count, 3)), axis=0)) * [0.5, 2.0, 6.0]


def column(balancer, name):
    return [task[name] for task in balancer.record()["tasks"].values()]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_is_torchs(decay):
    rng = np.random.default_rng(0)
    ours, state = rng.normal(size=5), adam_state(5)
    theirs = torch.nn.Parameter(torch.from_numpy(ours.copy()))
    optimizer = torch.optim.Adam([theirs], lr=0.1, weight_decay=decay)
    for gradient in rng.normal(size=(60, 5)):
        ours = adam_step(ours, gradient, state, 0.1, decay)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12)


def test_adam_leaves_a_number_without_gradient_as_if_the_step_had_not_been():
    rng = np.random.default_rng(1)
    both, state = np.zeros(2), adam_state(2)
    alone, own = np.zeros(1), adam_state(1)
    for step, gradient in enumerate(rng.normal(size=20)):
        seen = step % 3 != 0
        both = adam_step(both, np.array([gradient, gradient if seen else NAN]), state, 0.1, 0.3)
        if seen:
            alone = adam_step(alone, np.array([gradient]), own, 0.1, 0.3)
    assert both[1] == alone[0] and [values[1] for values in state.values()] == [values[0] for values in own.values()]


def test_uncertainty_equals_torchjds_trained_by_torchs_adam():
    torchjd = pytest.importorskip("torchjd.scalarization", reason=REASON)
    balancer, module = uncertainty(learning_rate=0.05), torchjd.UW(3).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for step, losses in enumerate(walks(2), start=1):
        values = torch.from_numpy(losses).requires_grad_()
        optimizer.zero_grad()
        module(values).backward()
        # The gradient of the losses is what the weights are, up to their sum.
        np.testing.assert_allclose(balancer.weights(UNUSED), (values.grad / values.grad.sum()).numpy(), rtol=0, atol=1e-10)
        optimizer.step()
        balancer.observe(Signals(step, train_losses=losses))
        np.testing.assert_allclose(column(balancer, "log_variance"), module.log_var.detach().numpy(), rtol=0, atol=1e-10)


def test_uncertainty_of_constant_losses_comes_to_rest_at_weights_inverse_to_them():
    balancer = uncertainty()
    for step in range(1, 2001):
        balancer.observe(Signals(step, train_losses=np.array([0.5, 1.0, 4.0])))
    np.testing.assert_allclose(balancer.weights(UNUSED), np.array([2.0, 1.0, 0.25]) / 3.25, rtol=1e-6)


def test_uncertainty_stays_finite_for_a_loss_of_zero():
    balancer = uncertainty(learning_rate=100.0)
    for step in range(1, 101):
        balancer.observe(Signals(step, train_losses=np.array([0.0, 1e100, 1.0])))
    weights = balancer.weights(UNUSED)
    assert weights.min() > 0 and abs(weights.sum() - 1) < 1e-12


def test_famo_before_the_first_observation_weighs_inversely_to_the_losses_before_training():
    np.testing.assert_allclose(famo().weights(UNUSED), np.array([4.0, 2.0, 1.0]) / 7, rtol=1e-7)
    assert famo(signal="validation").weights(UNUSED).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_famo_equals_torchjds(decay):
    torchjd = pytest.importorskip("torchjd.scalarization", reason=REASON)
    balancer, module = famo(decay=decay), torchjd.FAMO(3, lr=0.025, weight_decay=decay).double()
    losses = walks(3, 61)
    balancer.start(losses[0])
    for step in range(1, 61):
        before, after = losses[step - 1], losses[step]
        values = torch.from_numpy(before).requires_grad_()
        module(values).backward()
        np.testing.assert_allclose(balancer.weights(UNUSED), values.grad.numpy(), rtol=0, atol=1e-6)
        module.update(torch.from_numpy(after))
        balancer.observe(Signals(step, train_losses=before, train_losses_after=after))
        np.testing.assert_allclose(column(balancer, "logit"), module._w.detach().numpy(), rtol=0, atol=1e-10)


def test_starred_famo_weighs_with_the_softmax_of_logits_that_validation_losses_move():
    torchjd = pytest.importorskip("torchjd.scalarization", reason=REASON)
    balancer, module = famo(signal="validation"), torchjd.FAMO(3, lr=0.025, weight_decay=0.01).double()
    for step, (before, after) in enumerate(zip(walks(4), walks(5), strict=True), start=1):
        module(torch.from_numpy(before))
        module.update(torch.from_numpy(after))
        balancer.observe(Signals(step, validation_losses_before=before, validation_losses=after))
        np.testing.assert_allclose(balancer.weights(UNUSED), torch.softmax(module._w, 0).detach().numpy(), rtol=0, atol=1e-10)


def test_famo_raises_the_logit_of_the_task_that_went_down_least():
    balancer = famo()
    balancer.observe(Signals(1, train_losses=np.ones(3), train_losses_after=np.array([0.5, 0.9, 1.1])))
    # Adam's first step is the learning rate against the sign of the gradient.
    assert np.sign(column(balancer, "logit")).tolist() == [-1, 1, 1]


def test_famo_updates_the_present_tasks_as_if_they_were_the_only_ones():
    both = create(FamoConfig(kind="famo"), ["a", "b"], 1)
    three = famo()
    for step, (before, after) in enumerate(zip(walks(6), walks(7), strict=True), start=1):
        both.observe(Signals(step, train_losses=before[:2], train_losses_after=after[:2]))
        before[2] = NAN
        three.observe(Signals(step, train_losses=before, train_losses_after=after))
    assert column(three, "logit") == [*column(both, "logit"), 0.0]


def test_a_task_without_any_loss_counts_in_famo_with_the_mean_of_the_others():
    balancer = create(FamoConfig(kind="famo"), TASKS, 0)
    assert balancer.weights(UNUSED).tolist() == pytest.approx([1 / 3] * 3)
    balancer.start(np.array([NAN, 1.0, 3.0]))
    np.testing.assert_allclose(balancer.weights(UNUSED), np.array([1 / 2, 1, 1 / 3]) / (11 / 6), rtol=1e-7)
