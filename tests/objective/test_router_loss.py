"""The router's auxiliary loss: transformers' own for a row without padding, weighted by tokens over a step."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ROUTED_NAMES, tiny_model

from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.objective.router_loss import router_loss

FACTORS = torch.tensor([0.05, 0.02], dtype=torch.float64)
NOTHING = torch.zeros(2, dtype=torch.float64)


def routed_model(name, **changes):
    """Routers that do not treat all experts alike."""
    model = tiny_model(name, **changes).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
                parameter.normal_(generator=generator)
    return model


def row(length=20, padding=0, seed=0):
    """A row of one document, with padding behind it."""
    ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([ids, torch.zeros(1, padding, dtype=torch.int64)], dim=1)
    labels = ids.roll(-1, 1)
    labels[:, max(length - 1, 0) :] = -100
    tasks = torch.zeros_like(ids)
    tasks[:, length:] = -1
    positions = torch.cat([torch.arange(length), torch.arange(padding)])[None]
    return ids, positions, labels, tasks, (labels >= 0).float()


def gradients(objective, given, factors, step_tokens):
    objective.zero_grad()
    loss, sums = objective(*given, factors, step_tokens)
    loss.backward()
    return loss.detach(), sums, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ROUTED_NAMES)
def test_one_row_has_transformers_own_loss_and_gradients(name, checkpointing):
    model, (ids, positions, labels, tasks, weights) = routed_model(name), row()
    output = model(input_ids=ids, labels=ids, output_router_logits=True)  # its loss is the mean over 19 tokens
    expected = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = MultiTaskObjective(model, 2, router_loss_coefficient="auto")
    assert objective.router_loss.coefficient == 0.02
    loss, sums, found = gradients(objective, (ids, positions, labels, tasks, weights), torch.full((2,), 1 / 19, dtype=torch.float64), 20)
    assert output.aux_loss > 1.05  # 1 is perfect balance, where the gradient says little
    torch.testing.assert_close(sums[-1] / 20, output.aux_loss.double().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, output.loss.detach(), rtol=1e-5, atol=0)
    for (parameter, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_padding_does_not_count(name):
    objective = MultiTaskObjective(routed_model(name), 2, router_loss_coefficient=1.0)
    (_, sums, expected), (_, padded_sums, found) = (gradients(objective, row(padding=padding), NOTHING, 20) for padding in (0, 12))
    torch.testing.assert_close(padded_sums, sums, rtol=1e-5, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for parameter in expected:
        torch.testing.assert_close(found[parameter], expected[parameter], rtol=1e-3, atol=1e-6)


def test_a_batch_of_padding_alone_adds_nothing():
    objective = MultiTaskObjective(routed_model("mixtral"), 2, router_loss_coefficient=1.0)
    loss, sums, found = gradients(objective, row(length=0, padding=8), NOTHING, 20)
    assert loss == 0 and sums.tolist() == [0, 0, 0]
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in found.values())


def test_micro_batches_count_by_their_tokens():
    """Copies of one row in micro-batches of any size are the row: where f and P are alike everywhere, nothing depends on the split."""
    objective = MultiTaskObjective(routed_model("mixtral"), 2, router_loss_coefficient=1.0)
    _, sums, expected = gradients(objective, row(), NOTHING, 20)
    twice = tuple(values.repeat(2, 1) for values in row(padding=4))
    parts = [gradients(objective, given, NOTHING, 60) for given in (twice, row())]
    torch.testing.assert_close(sum(part[1] for part in parts) / 3, sums, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), gradient, rtol=1e-3, atol=1e-6)


def test_different_micro_batches_give_the_mean_weighted_by_tokens():
    objective = MultiTaskObjective(routed_model("mixtral"), 2, router_loss_coefficient=0.5)
    lengths = (5, 30)
    alone = [gradients(objective, row(length, seed=length), NOTHING, length) for length in lengths]
    together = [gradients(objective, row(length, padding=3, seed=length), NOTHING, 35) for length in lengths]
    for (loss, _, gradient), (part, _, found), length in zip(alone, together, lengths, strict=True):
        torch.testing.assert_close(part, loss * length / 35, rtol=1e-5, atol=0)
        for name in gradient:
            torch.testing.assert_close(found[name], gradient[name] * length / 35, rtol=1e-3, atol=1e-6)


def test_tasks_losses_stay_without_it():
    model, given = routed_model("mixtral"), row()
    with_it, without = MultiTaskObjective(model, 2, router_loss_coefficient="auto"), MultiTaskObjective(model, 2)
    (loss, sums), (plain_loss, plain_sums) = with_it(*given, FACTORS), without(*given, FACTORS, 20)
    assert sums.shape == plain_sums.shape == (2,) and torch.equal(sums, plain_sums) and torch.equal(loss, plain_loss)
    assert torch.equal(with_it(*given, FACTORS, 20)[1][:2], sums) and with_it(*given, FACTORS, 20)[0] > loss


def test_adapters_feel_it_through_a_frozen_router():
    model = get_peft_model(routed_model("qwen3_moe"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    objective = MultiTaskObjective(model, 2, router_loss_coefficient="auto")
    _, _, found = gradients(objective, row(), NOTHING, 20)
    assert found and all("lora" in name for name in found) and max(gradient.abs().max() for gradient in found.values()) > 1e-6


def test_models_without_experts_have_none():
    assert router_loss(tiny_model("llama"), "auto") is None
    assert router_loss(tiny_model("mixtral"), 0) is None
    assert router_loss(tiny_model("mixtral", router_aux_loss_coef=0.0), "auto") is None
    with pytest.raises(UserError, match="no auxiliary loss"):
        router_loss(tiny_model("llama"), 0.1)


def test_layers_without_experts_have_nothing_to_add():
    objective = MultiTaskObjective(tiny_model("qwen3_moe", mlp_only_layers=[0, 1]), 2, router_loss_coefficient="auto")
    loss, sums = objective(*row(), FACTORS, 20)
    assert sums.shape == (3,) and sums[-1] == 0 and torch.equal(loss, objective(*row(), FACTORS)[0])


def test_a_loss_of_another_kind_is_not_guessed(monkeypatch):
    model = tiny_model("mixtral")
    monkeypatch.setattr(sys.modules[type(model).__module__], "load_balancing_loss_func", lambda logits, experts, keys, top_k, mask: 0)
    with pytest.raises(UserError, match="not known here") as error:
        router_loss(model, "auto")
    assert "0" in error.value.fix
