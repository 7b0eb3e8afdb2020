"""`gradnorm` against autograd through a real network, where it comes to rest, and absent tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.config import GradNormConfig
from mftcoder_coba.errors import UserError

TASKS = ["a", "b", "c"]
UNUSED = np.ones(3)
NAN = math.nan


def gradnorm(tasks=TASKS, **config):
    return create(GradNormConfig(kind="gradnorm", **config), tasks, 1)


def train(balancer, losses, norms):
    """Observes one step and returns the weights after it, [K]."""
    step = balancer.state_dict()["step"] + 1
    balancer.observe(Signals(step, train_losses=np.array(losses), output_gradient_norms=np.array(norms)))
    return balancer.weights(UNUSED)


def column(balancer, name):
    return [task[name] for task in balancer.record()["tasks"].values()]


class Network(torch.nn.Module):
    """Three regression tasks of very different scale, each with a batch of its own, over one hidden and one output layer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(6)
        self.body = torch.nn.Linear(4, 6).double()
        self.output = torch.nn.Linear(6, 2).double()
        self.inputs = torch.randn(3, 16, 4, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(3, 16, 2, generator=generator, dtype=torch.float64)
        self.scales = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)

    def losses(self):
        """[K]"""
        out = self.output(torch.tanh(self.body(self.inputs)))  # [tasks, rows, 2]
        return self.scales * (out - self.targets).square().mean(dim=(1, 2))

    def norm(self, loss):
        """Of the gradient of `loss` at the output layer, and itself open to differentiation."""
        gradients = torch.autograd.grad(loss, tuple(self.output.parameters()), create_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients]).norm()


@pytest.mark.parametrize(("rate", "alpha"), [(0.025, 1.5), (0.4, 0.5)], ids=["usual", "fast"])
def test_the_closed_form_equals_autograd_of_the_papers_loss_through_a_network(rate, alpha):
    network, balancer = Network(), gradnorm(learning_rate=rate, alpha=alpha)
    factors = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, initial, floored = torch.optim.Adam([factors], lr=rate), network.losses().detach(), 0
    for _ in range(40):
        losses = network.losses()
        rates = (losses / initial / (losses / initial).mean()).detach()
        weighted = torch.stack([network.norm(factor * loss) for factor, loss in zip(factors, losses, strict=True)])
        target = weighted.mean().detach() * rates**alpha
        train(balancer, losses.detach().numpy(), [network.norm(loss).item() for loss in losses])
        factors.grad = torch.autograd.grad((weighted - target).abs().sum(), factors, retain_graph=True)[0]
        optimizer.step()
        with torch.no_grad():
            floored += int((factors < 1e-3).sum())
            factors.clamp_(min=1e-3)
            factors *= 3 / factors.sum()
        np.testing.assert_allclose(balancer.weights(UNUSED), factors.detach().numpy() / 3, rtol=0, atol=1e-9)
        np.testing.assert_allclose(column(balancer, "target_norm"), target.numpy(), rtol=1e-9)
        step = torch.autograd.grad((torch.from_numpy(balancer.weights(UNUSED)) * losses).sum(), tuple(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), step, strict=True):
                parameter -= 0.05 * gradient
    assert np.ptp(balancer.weights(UNUSED)) > 0.1  # something was learned
    assert (floored > 0) == (rate == 0.4)  # the fast one also reaches the bound, and comes back from it


def test_a_task_that_lags_gets_more_and_one_that_is_ahead_gets_less():
    balancer = gradnorm()
    train(balancer, [2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    weights = train(balancer, [2.0, 1.5, 1.0], [1.0, 1.0, 1.0])
    assert weights[0] > weights[1] > weights[2] and weights[0] > 1 / 3 > weights[2]


def test_of_tasks_that_come_down_alike_the_one_with_the_larger_gradient_gets_less():
    weights = train(gradnorm(), [1.0, 1.0, 1.0], [0.1, 5.0, 0.1])
    assert weights[1] < 1 / 3 < weights[0] == weights[2]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_it_comes_to_rest_where_weighted_norms_are_proportional_to_the_training_rates(alpha):
    """With alpha 1 (and 0) the targets have the mean of the norms, so that all of them can be met."""
    balancer, ratios, norms = gradnorm(alpha=alpha, learning_rate=0.002), np.array([0.5, 1.0, 0.8]), np.array([1.0, 2.0, 0.5])
    train(balancer, [1.0, 1.0, 1.0], norms)
    for _ in range(700):
        weights = train(balancer, ratios, norms)
    expected = ratios**alpha / norms
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=0.02)


def test_the_starred_form_equals_the_plain_one_where_both_splits_coincide():
    rng = np.random.default_rng(0)
    losses, norms = np.exp(np.cumsum(rng.normal(-0.01, 0.05, (2, 60, 3)), axis=1))
    for values in (losses, norms):
        values[1:][rng.random((59, 3)) < 0.2] = NAN
    plain, starred = gradnorm(), gradnorm(signal="validation")
    starred.start(losses[0])
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        plain.observe(Signals(step, train_losses=loss, output_gradient_norms=norm))
        starred.observe(Signals(step, validation_losses=loss, validation_output_gradient_norms=norm))
        assert plain.weights(UNUSED).tolist() == starred.weights(UNUSED).tolist()
        assert plain.record() == starred.record()
    assert np.ptp(plain.weights(UNUSED)) > 0.1


def test_the_starred_form_divides_by_the_validation_losses_before_training():
    balancer = gradnorm(signal="validation")
    with pytest.raises(UserError, match="task b.*gradnorm"):
        balancer.start(np.array([1.0, 0.0, 1.0]))
    gradnorm().start(np.array([1.0, 0.0, NAN]))  # not looked at
    with pytest.raises(ValueError, match="before start"):
        balancer.observe(Signals(1, validation_losses=UNUSED, validation_output_gradient_norms=UNUSED))
    balancer.start(np.array([1.0, 2.0, 4.0]))
    balancer.observe(Signals(1, validation_losses=UNUSED, validation_output_gradient_norms=UNUSED))
    assert column(balancer, "ratio") == [1.0, 0.5, 0.25]


def test_present_tasks_share_what_they_had_as_if_they_were_the_only_ones():
    both, three = gradnorm(["a", "b"]), gradnorm()
    rng = np.random.default_rng(1)
    for losses, norms in np.exp(rng.normal(0, 0.3, (30, 2, 2))):
        train(both, losses, norms)
        weights = train(three, [*losses, 1.0], [*norms, NAN])
        assert weights[2] == pytest.approx(1 / 3, rel=1e-14)
        np.testing.assert_allclose(weights[:2], both.weights(UNUSED) * 2 / 3, rtol=1e-12)
    assert abs(weights[0] - weights[1]) > 0.01


@pytest.mark.parametrize(("losses", "norms"), [([1.0, NAN, 1.0], [1.0, 1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, NAN, 2.0])])
def test_a_task_without_its_loss_or_without_its_norm_is_absent(losses, norms):
    balancer = gradnorm()
    train(balancer, losses, norms)
    assert column(balancer, "ratio") == [1.0, None, 1.0] and column(balancer, "gradient_norm") == [1.0, None, 2.0]
    assert balancer.state["initial"].tolist()[::2] == [1.0, 1.0] and math.isnan(balancer.state["initial"][1])


def test_a_loss_of_zero_is_no_reference_and_when_all_losses_are_zero_only_the_norms_count():
    balancer = gradnorm()
    train(balancer, [0.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert column(balancer, "ratio") == [None, 1.0, 1.0]
    train(balancer, [2.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    weights = train(balancer, [0.0, 0.0, 0.0], [1.0, 1.0, 4.0])
    np.testing.assert_allclose(column(balancer, "target_norm"), [2.0, 2.0, 2.0], rtol=0.05)
    assert weights[2] < 1 / 3


def test_a_record_shows_what_the_weights_followed():
    balancer = gradnorm(alpha=2.0)
    assert balancer.record()["tasks"]["a"] == {"weight": 1 / 3, "ratio": None, "gradient_norm": None, "weighted_norm": None, "target_norm": None}
    train(balancer, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    weights = balancer.weights(UNUSED)
    train(balancer, [1.0, 1.0, 6.0], [0.5, 2.0, 1.0])
    np.testing.assert_allclose(column(balancer, "ratio"), [1.0, 0.5, 1.5])
    weighted = 3 * weights * [0.5, 2.0, 1.0]
    np.testing.assert_allclose(column(balancer, "weighted_norm"), weighted)
    np.testing.assert_allclose(column(balancer, "target_norm"), weighted.mean() * np.array([1.0, 0.25, 2.25]))
