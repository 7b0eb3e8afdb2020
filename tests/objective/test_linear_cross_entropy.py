import pytest
import torch
import torch.nn.functional as F

from mftcoder_coba.objective import OutputTransform, linear_cross_entropy

TRANSFORMS = {
    "plain": (OutputTransform(), lambda z: z),
    "scaled": (OutputTransform(scale=0.25), lambda z: 0.25 * z),
    "capped": (OutputTransform(cap=3.0), lambda z: 3.0 * torch.tanh(z / 3.0)),
    "scaled and capped": (OutputTransform(scale=2.0, cap=3.0), lambda z: 3.0 * torch.tanh(2.0 * z / 3.0)),
}


def problem(tokens: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(50, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(50, (tokens,)), torch.rand(tokens)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("chunk_elements", [50, 350, 10**6])
def test_loss_and_gradients_equal_autograd_through_full_logits(name, chunk_elements):
    transform, reference = TRANSFORMS[name]
    hidden, weight, bias, labels, factors = problem(23)
    loss, token_losses, normalisers = linear_cross_entropy(hidden, weight, bias, labels, factors, transform, chunk_elements)
    gradients = torch.autograd.grad(3.0 * loss, (hidden, weight, bias))
    expected = F.cross_entropy(reference(F.linear(hidden, weight, bias)), labels, reduction="none")
    expected_gradients = torch.autograd.grad(3.0 * (expected * factors).sum(), (hidden, weight, bias))
    torch.testing.assert_close(token_losses, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalisers, reference(F.linear(hidden, weight, bias)).logsumexp(1).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.detach(), (expected * factors).sum().detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_gradients_are_as_near_as_bfloat16_allows():
    hidden, weight, bias, labels, factors = problem(64, torch.bfloat16)
    loss, *_ = linear_cross_entropy(hidden, weight, bias, labels, factors, OutputTransform(), 350)
    (ours,) = torch.autograd.grad(loss, weight)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    (theirs,) = torch.autograd.grad((F.cross_entropy(F.linear(*exact), labels, reduction="none") * factors).sum(), exact[1])
    assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_no_supervised_token_gives_zero_loss_and_zero_gradients():
    hidden, weight, bias, labels, factors = problem(0)
    loss, token_losses, _ = linear_cross_entropy(hidden, weight, bias, labels, factors, OutputTransform())
    assert loss.item() == 0 and len(token_losses) == 0
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert all(not gradient.any() for gradient in gradients) and gradients[1].shape == weight.shape


def test_a_frozen_output_layer_gets_no_gradient_but_passes_it_on():
    hidden, weight, _, labels, factors = problem(9)
    loss, *_ = linear_cross_entropy(hidden, weight.detach(), None, labels, factors, OutputTransform(), 100)
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


def test_without_factors_only_token_losses_are_formed():
    hidden, weight, bias, labels, _ = problem(9)
    with torch.no_grad():
        loss, token_losses, normalisers = linear_cross_entropy(hidden, weight, bias, labels, None, OutputTransform(), 100)
    torch.testing.assert_close(token_losses, F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none").detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalisers, F.linear(hidden, weight, bias).logsumexp(1).detach(), rtol=1e-5, atol=1e-5)
    assert loss.item() == 0
