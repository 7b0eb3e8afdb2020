import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def batch(rows=2, length=12, supervised=lambda labels: labels[:, 4:9], tasks=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    supervised(labels)[:] = supervised(ids.roll(-1, 1))
    task_ids = torch.arange(rows)[:, None].expand(rows, length) % tasks
    positions = torch.arange(length).expand(rows, length)
    return ids, positions, labels, task_ids, (labels >= 0).float()


def test_loss_and_sums_are_those_of_the_definition():
    model = tiny_model("llama")
    ids, positions, labels, task_ids, loss_weights = batch()
    factors = torch.tensor([0.3, 0.02], dtype=torch.float64)
    loss, sums = MultiTaskObjective(model, 2)(ids, positions, labels, task_ids, loss_weights, factors)
    token_losses = torch.nn.functional.cross_entropy(model(ids).logits.transpose(1, 2), labels, reduction="none").double()
    expected = torch.stack([token_losses[task_ids == k].sum() for k in range(2)])
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double().detach(), (factors * expected).sum().detach(), rtol=1e-5, atol=1e-6)


def test_a_micro_batch_of_a_single_task_has_gradients_proportional_to_its_weight():
    model = tiny_model("llama")
    objective = MultiTaskObjective(model, 2)
    inputs = batch(tasks=1)
    gradients = []
    for weight in (0.2, 0.6):
        model.zero_grad()
        objective(*inputs, torch.tensor([weight / 10, 0.5], dtype=torch.float64))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1e-4, atol=1e-7)


def test_only_supervised_tokens_reach_the_output_layer():
    objective = MultiTaskObjective(tiny_model("llama"), 2)
    seen = []
    objective.output_loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    inputs = batch()
    objective(*inputs, torch.ones(2, dtype=torch.float64))
    assert seen == [int((inputs[2] >= 0).sum())] == [10]


@pytest.mark.parametrize("adapter", [False, True])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(adapter):
    vocabulary, length = 50_000, 4096
    model = tiny_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=length,
    )
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    objective = MultiTaskObjective(model, 1)
    inputs = batch(rows=1, length=length, supervised=lambda labels: labels, tasks=1)
    with LargestTensor() as largest:
        objective(*inputs, torch.ones(1, dtype=torch.float64))[0].backward()
    assert largest.elements < vocabulary * length / 4


def test_checkpoints_hold_the_output_layer_once():
    model = tiny_model("llama_tied")
    assert {name.removeprefix("model.") for name in MultiTaskObjective(model, 1).state_dict()} == set(model.state_dict())


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    model = tiny_model("llama")
    objective = MultiTaskObjective(model, 1)
    original = model.forward

    def doubled(**inputs):
        output = original(**inputs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(UserError, match="own logits"):
        objective.check_output_layer(torch.arange(12)[None], torch.arange(12)[None])


def test_an_adapter_on_the_output_layer_is_refused():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="output layer"):
        MultiTaskObjective(model, 1)
