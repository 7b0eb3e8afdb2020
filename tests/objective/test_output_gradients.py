"""Gradients of single tasks at the output layer, against K explicit backward passes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mftcoder_coba.objective import MultiTaskObjective, TaskTokens, gradient_norms, gradient_products

TASKS = 4  # the last one is in no batch
TRANSFORMS = {
    "plain": ({}, lambda z: z),
    "scaled and capped": ({"logit_scale": 2.0, "final_logit_softcapping": 1.5}, lambda z: 1.5 * torch.tanh(2.0 * z / 1.5)),
}


class Alone:
    """One process is all there is."""

    world_size = 1

    def all_reduce_sum(self, values):
        return values

    def reduce_scatter_sum(self, values):
        return values


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; views of what is there already do not count."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return result


def micro_batches(seed, reduction="token", vocabulary=64):
    """Three of uneven tasks and lengths; the second has no supervised token."""
    generator = torch.Generator().manual_seed(seed)
    for number, (rows, length) in enumerate([(3, 12), (2, 8), (2, 20)]):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        labels = ids.roll(-1, 1).masked_fill(torch.rand(rows, length, generator=generator) < 0.4, -100)
        labels = torch.full_like(ids, -100) if number == 1 else labels
        task_ids = torch.randint(TASKS - 1, (rows, 1), generator=generator).expand(rows, length).clone()
        task_ids[0], task_ids[1, :5], task_ids[1, 5:] = 0, 1, 2
        weights = (labels >= 0).float()
        if reduction == "sample":
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        yield ids, torch.arange(length).expand(rows, length), labels, task_ids, weights


def measured(objective, batches):
    """(TaskTokens of the forward passes, denominators [K])."""
    with objective.output_loss.collecting() as passes:
        for batch in batches:
            objective(*batch, None)
    denominators = np.array([sum(float(weights[tasks == k].sum()) for *_, tasks, weights in batches) for k in range(TASKS)])
    return TaskTokens.of(passes, objective.output_loss.layer(copy=True), denominators), denominators


def explicit(objective, batches, denominators, function):
    """[K, numbers of weight and bias] by a backward pass for each task through all logits; NaN for absent tasks."""
    layer = objective.output_loss._layer[0]
    weight, bias = (None if values is None else values.detach().clone().requires_grad_() for values in (layer.weight, layer.bias))
    gradients = []
    for task in range(TASKS):
        loss = torch.zeros(())
        for ids, positions, labels, tasks, loss_weights in batches:
            logits = function(F.linear(objective.hidden_states(ids, positions).detach(), weight, bias))
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            loss = loss + (losses * loss_weights * (tasks == task)).sum() / denominators[task]
        found = torch.autograd.grad(loss, [values for values in (weight, bias) if values is not None])
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(gradients).double().numpy()


def model_of(name, changes):
    model = tiny_model("llama_tied" if name == "lora" else name, **changes)
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    with torch.no_grad():  # so that the cap bends, and the bias is not 0
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["phi", "llama_tied", "lora"])  # with a bias; tied to the input; frozen
def test_norms_and_products_equal_those_of_explicit_backward_passes(name, transform, reduction):
    changes, function = TRANSFORMS[transform]
    objective = MultiTaskObjective(model_of(name, changes), TASKS)
    first, second = list(micro_batches(0, reduction)), list(micro_batches(1, reduction))
    (tokens, denominators), (others, other_denominators) = measured(objective, first), measured(objective, second)
    expected = explicit(objective, first, denominators, function)
    total = np.nansum(explicit(objective, second, other_denominators, function), axis=0)
    norms, products = np.linalg.norm(expected, axis=1), expected @ total
    assert np.isnan(norms).tolist() == [False] * 3 + [True] and norms[:3].min() > 1e-3
    # Cancellation: an inner product is as exact as its factors are long.
    scale = norms * np.linalg.norm(total)
    for chunk_elements in (700, 10**6):  # 4 or 5 of 64 rows at a time, or all
        np.testing.assert_allclose(gradient_norms(tokens, Alone(), chunk_elements), norms, rtol=1e-5)
        found = gradient_products(tokens, others, Alone(), chunk_elements)
        assert np.isnan(found).tolist() == [False] * 3 + [True]
        assert (np.abs(found - products) / scale)[:3].max() <= 1e-6 and (np.abs(products) / scale)[:3].min() > 1e-3


def test_nothing_of_the_size_of_the_logits_or_of_all_gradients_is_made():
    vocabulary, length, width, limit = 20_000, 2048, 16, 2**18
    model = tiny_model(
        "llama", vocab_size=vocabulary, hidden_size=width, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=length
    )
    objective = MultiTaskObjective(model, 2)
    ids = torch.randint(vocabulary, (1, length))
    tasks = (torch.arange(length) % 2)[None]
    with torch.no_grad(), objective.output_loss.collecting() as passes:
        objective(ids, torch.arange(length)[None], ids, tasks, torch.ones(1, length), None)
    tokens = TaskTokens.of(passes, objective.output_loss.layer(), np.full(2, length / 2))
    with LargestTensor() as largest:
        gradient_norms(tokens, Alone(), limit)
        gradient_products(tokens, tokens, Alone(), limit)
    assert limit / 4 < largest.elements <= limit < min(vocabulary * length, 2 * vocabulary * width)


def test_chunks_of_one_token_and_one_row_give_the_same_norms():
    tokens, _ = measured(MultiTaskObjective(tiny_model("phi", vocab_size=20), TASKS), list(micro_batches(4, vocabulary=20)))
    np.testing.assert_allclose(gradient_norms(tokens, Alone(), 1), gradient_norms(tokens, Alone()), rtol=1e-5)


def test_the_product_with_itself_adds_up_to_the_square_of_the_sum():
    """Invariant: sum_k <g_k, sum_j g_j> is the squared norm of the gradient of all as one task."""
    tokens, _ = measured(MultiTaskObjective(tiny_model("phi"), TASKS), list(micro_batches(2)))
    products = gradient_products(tokens, tokens, Alone())
    assert np.nansum(products) == pytest.approx(gradient_norms(tokens.together(), Alone())[0] ** 2, rel=1e-6)


def test_bfloat16_norms_are_as_near_as_bfloat16_allows():
    objective = MultiTaskObjective(model_of("phi", {}).bfloat16(), TASKS)
    batches = list(micro_batches(3))
    tokens, denominators = measured(objective, batches)
    exact = MultiTaskObjective(objective.model.float(), TASKS)
    expected = np.linalg.norm(explicit(exact, batches, denominators, lambda z: z), axis=1)
    np.testing.assert_allclose(gradient_norms(tokens, Alone()), expected, rtol=0.02)


def test_only_passes_within_collecting_are_kept_each_once_and_without_their_graph():
    """Gradient checkpointing repeats layers in the backward pass, but not the output layer."""
    model = tiny_model("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = MultiTaskObjective(model, TASKS)
    batch = next(micro_batches(0))
    with objective.output_loss.collecting() as passes:
        objective(*batch, torch.ones(TASKS, dtype=torch.float64))[0].backward()
    objective(*batch, None)
    (one,) = passes
    assert one.hidden.shape == (int((batch[2] >= 0).sum()), 32) and not one.hidden.requires_grad


def test_a_copy_of_the_layer_stays_as_it_was():
    objective = MultiTaskObjective(tiny_model("phi"), TASKS)
    now, copy = objective.output_loss.layer(), objective.output_loss.layer(copy=True)
    before = copy.weight.clone()
    with torch.no_grad():
        for parameter in objective.output_loss.external_parameters:
            parameter.add_(1.0)
    assert torch.equal(copy.weight, before) and torch.equal(now.weight, before + 1.0)
    assert torch.equal(now.bias, copy.bias + 1.0)
