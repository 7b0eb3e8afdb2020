"""`metaweighting` against autograd through a step of gradient descent, scale, and absent tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.config import MetaWeightingConfig

TASKS = ["a", "b", "c"]
UNUSED = np.ones(3)
NAN = math.nan


def metaweighting(tasks=TASKS, **config):
    return create(MetaWeightingConfig(kind="metaweighting", **config), tasks, 1)


def observe(balancer, products):
    step = balancer.state_dict()["step"] + 1
    balancer.observe(Signals(step, output_gradient_products=np.array(products)))
    return balancer.weights(UNUSED)


def column(balancer, name):
    return [task[name] for task in balancer.record()["tasks"].values()]


def bowls(seed):
    """Three quadratic losses over 5 parameters: theta [5] -> [3]."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return lambda theta: 0.5 * torch.einsum("kij,kj->ki", roots, theta - centres).square().sum(dim=1)


def task_gradients(losses, theta):
    """[K, 5]"""
    theta = theta.detach().requires_grad_()
    return torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses(theta)])


@pytest.mark.parametrize("at", ["after the step", "before the step"])
@pytest.mark.parametrize("eta", [1e-9, 1e-2])
def test_the_products_give_the_derivative_of_the_validation_losses_through_the_step(eta, at):
    """Exactly, whatever eta, with the validation gradient after the step; with the one before it as eta goes to 0."""
    train, validation = bowls(1), bowls(2)
    theta = torch.full((5,), 0.3, dtype=torch.float64)
    slopes = task_gradients(train, theta)
    balancer = metaweighting()
    balancer.state["logit"] = np.array([0.4, -0.2, 0.1])
    logits = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    after = theta - eta * torch.softmax(logits, 0) @ slopes
    expected = torch.autograd.grad(validation(after).sum(), logits)[0].numpy() / eta
    products = slopes @ task_gradients(validation, after if at == "after the step" else theta).sum(dim=0)
    observe(balancer, products.numpy())
    got = balancer.state["gradient_mean"] / 0.1  # Adam's mean after its first step
    off = np.abs(got - expected).max() / np.abs(expected).max()
    assert (off < 1e-6) == (at == "after the step" or eta == 1e-9)


@pytest.mark.parametrize("gradients", ["output_layer", "all"])
def test_a_run_equals_autograd_through_every_step_and_torchs_adam_whatever_eta(gradients):
    train, validation, eta = bowls(3), bowls(4), 0.01
    balancer, logits = metaweighting(gradients=gradients), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([logits], lr=0.025, eps=1e-150)
    theta = torch.full((5,), 0.3, dtype=torch.float64)
    for step in range(1, 41):
        slopes = task_gradients(train, theta)
        optimizer.zero_grad()
        after = theta - eta * torch.softmax(logits, 0) @ slopes
        validation(after).sum().backward()
        optimizer.step()
        theta = after.detach()
        products = (slopes @ task_gradients(validation, theta).sum(dim=0)).numpy()
        balancer.observe(Signals(step, **{next(iter(balancer.signals)): products}))
        np.testing.assert_allclose(balancer.weights(UNUSED), torch.softmax(logits, 0).detach().numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(column(balancer, "product"), products)
    assert np.ptp(balancer.weights(UNUSED)) > 0.1


def test_a_task_whose_gradient_points_with_that_of_validation_gains_and_one_against_it_loses():
    weights = observe(metaweighting(), [2.0, 0.1, -1.0])
    assert weights[0] > 1 / 3 > weights[2]
    np.testing.assert_allclose(np.log(weights[0] / weights[2]), 2 * 0.025, rtol=1e-12)  # Adam's first step is its rate


@pytest.mark.parametrize("scale", [2.0**-300, 2.0**-40, 2.0**200])
def test_one_factor_of_all_products_changes_no_weight(scale):
    plain, scaled = metaweighting(), metaweighting()
    for products in np.random.default_rng(0).normal(0.1, 1.0, (40, 3)):
        np.testing.assert_allclose(observe(scaled, products * scale), observe(plain, products), rtol=1e-12)
    assert np.ptp(plain.weights(UNUSED)) > 0.01


def test_equal_products_move_nothing():
    """Adam would make a full step of what rounding leaves of their difference."""
    balancer = metaweighting()
    balancer.state["logit"] = np.array([0.4, -0.2, 0.1])
    for product in [0.0, *np.random.default_rng(2).normal(size=40)]:
        observe(balancer, [product] * 3)
    assert column(balancer, "logit") == [0.4, -0.2, 0.1]


def test_present_tasks_are_weighed_as_if_they_were_the_only_ones():
    both, three = metaweighting(["a", "b"]), metaweighting()
    for products in np.random.default_rng(1).normal(0.1, 1.0, (30, 2)):
        observe(both, products)
        observe(three, [*products, NAN])
    assert column(three, "logit") == [*column(both, "logit"), 0.0]
    assert column(three, "product")[2] is None and abs(column(both, "logit")[0]) > 0.01
