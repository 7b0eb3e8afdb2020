"""flash-attn gets the borders of our packed rows, and its numbers are SDPA's, through whole models and back."""

import numpy as np
import pytest
import torch
from experts import experts_config, experts_model
from flash_reference import flash_reference
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from mftcoder_coba.data import TaskData, collate
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import document_borders
from mftcoder_coba.objective import MultiTaskObjective

# Rows of documents by their lengths; the second is padded at its end, the third is one document, the last is padding alone.
ROWS = [[7, 1, 13, 3], [5, 11], [24], []]
LENGTH = 24
FACTORS = torch.tensor([0.3, 0.02, 0.1], dtype=torch.float64)


def batch(rows=ROWS, isolate=True):
    """As in a run: `collate` lays the documents down, of three tasks in turn."""
    generator = np.random.default_rng(0)
    samples, places = [[], [], []], []
    for row in rows:
        places.append([])
        for number, length in enumerate(row):
            samples[number % 3].append((generator.integers(0, 64, length).astype(np.int32), np.arange(length) >= length // 3))
            places[-1].append((number % 3, len(samples[number % 3]) - 1))
    return collate(places, [TaskData.from_samples(of_task) for of_task in samples], 3, 0, "token", isolate=isolate)


def inputs(batch):
    return batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights


def gradients(objective, given):
    """(loss, sums, gradients by name)."""
    objective.zero_grad()
    loss, sums = objective(*given, FACTORS)
    loss.backward()
    return loss.detach(), sums, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def adapted(architecture, adapter, checkpointing, **changes):
    model = tiny_model(architecture, **changes)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if adapter == "lora":
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    return experts_model(experts_config(), base=model) if adapter == "cgc" else model


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_borders_are_where_positions_restart_and_at_the_ends_of_rows():
    found = document_borders(batch().position_ids.view(1, -1))
    expected = [0, 7, 8, 21, 24, 29, 40, 48, 72, 96]  # 8 places of padding are a document, and so is a row of it
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == expected and found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 24


@pytest.mark.parametrize(
    ("architecture", "adapter", "changes"),
    [
        ("llama", None, {}),
        ("llama", "lora", {}),
        ("llama", "cgc", {}),
        ("qwen2", None, {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("phi", None, {}),
        ("gpt_neox", None, {}),
    ],
    ids=["llama", "lora", "cgc", "sliding window", "phi", "gpt_neox"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_sdpa(architecture, adapter, changes, checkpointing):
    model = adapted(architecture, adapter, checkpointing, **changes).train()
    objective = MultiTaskObjective(model, 3)
    given = inputs(batch())
    loss, sums, expected = gradients(objective, given)
    with flash_reference(base_of(model)) as calls:
        flash_loss, flash_sums, found = gradients(objective, given)
    layers = 2 * (2 if checkpointing else 1)
    assert calls.borders == [[0, 7, 8, 21, 24, 29, 40, 48, 72, 96]] * layers and calls.longest == [24] * layers and calls.dense == 0
    torch.testing.assert_close(flash_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flash_sums, sums, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys() and sum(gradient.norm() for gradient in expected.values()) > 0.1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_padded_rows_of_one_document_each():
    """Positions count on through the padding, so a row is one document for flash-attn, and the next row another."""
    model = tiny_model("llama")
    objective, given = MultiTaskObjective(model, 3), inputs(batch([[9], [24], [2]], isolate=False))
    _, sums, expected = gradients(objective, given)
    with flash_reference(model) as calls:
        _, flash_sums, found = gradients(objective, given)
    assert calls.borders == [[0, 24, 48, 72]] * 2
    torch.testing.assert_close(flash_sums, sums, rtol=1e-5, atol=1e-5)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_no_keywords_finds_the_borders_by_its_positions(monkeypatch):
    model = tiny_model("llama")
    objective, given = MultiTaskObjective(model, 3), inputs(batch())
    expected = objective(*given, None)[1]
    original = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda input_ids, position_ids, use_cache: original(input_ids, None, position_ids, use_cache=use_cache)
    )
    # There transformers hands over max_seqlen as a tensor, which the library turns into a number.
    from transformers import modeling_flash_attention_utils as utils

    prepare = utils.prepare_fa_kwargs_from_position_ids
    monkeypatch.setattr(utils, "prepare_fa_kwargs_from_position_ids", lambda ids: (prepare(ids)[0], tuple(int(m) for m in prepare(ids)[1])))
    with flash_reference(model) as calls:
        torch.testing.assert_close(objective(*given, None)[1], expected, rtol=1e-5, atol=1e-5)
    assert calls.borders == [[0, 7, 8, 21, 24, 29, 40, 48, 72, 96]] * 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi", "gpt_neox"])
def test_isolation_is_found(architecture):
    model = tiny_model(architecture)
    MultiTaskObjective(model, 3).check_isolation(torch.arange(12)[None])
    with flash_reference(model) as calls:
        MultiTaskObjective(model, 3).check_isolation(torch.arange(12)[None])
    assert calls.borders == [[0, 12, 24, 36, 48]] * 2


def test_a_model_whose_layers_drop_the_borders_is_refused(monkeypatch):
    model = tiny_model("llama")
    for layer in model.model.layers:
        original = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn,
            "forward",
            lambda hidden_states, position_embeddings, attention_mask, original=original, **_: original(
                hidden_states, position_embeddings, attention_mask
            ),
        )
    objective = MultiTaskObjective(model, 3)
    objective.check_isolation(torch.arange(12)[None])  # SDPA's mask is made above the layers
    with flash_reference(model) as calls, pytest.raises(UserError, match="sees the one before it"):
        objective.check_isolation(torch.arange(12)[None])
    assert calls.dense > 0 and not calls.borders


def test_a_model_with_a_state_that_runs_through_the_row_is_refused():
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2))

    class Backbone(torch.nn.Module):
        """Takes positions, and does nothing with them."""

        def forward(self, input_ids, position_ids, use_cache):
            return model.backbone(input_ids=input_ids, use_cache=use_cache)

    objective = MultiTaskObjective(model, 3)
    objective._backbone = lambda ids, positions: (Backbone()(ids, positions, False).last_hidden_state, None)
    with pytest.raises(UserError, match="data.packing"):
        objective.check_isolation(torch.arange(12)[None])
