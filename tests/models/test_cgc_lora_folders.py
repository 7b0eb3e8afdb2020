"""Folders of adapters with experts: written and read bit for bit, and what is said where one cannot be loaded."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from experts import TASKS, experts_model, token_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn

from mftcoder_coba.config import ModelConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import CgcLoraModel, load_model

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
IDS = token_ids()


def logits(model: nn.Module, **task: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **task).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    experts_model().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """One that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path, model: nn.Module | None = None) -> UserError:
    """The mistake that is told; the base model stays as it was."""
    model = model or tiny_model("llama")
    before = list(model.named_modules())
    with pytest.raises(UserError) as error:
        CgcLoraModel.load(model, folder)
    assert list(model.named_modules()) == before
    assert error.value.where == str(folder) and error.value.fix
    return error.value


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_loaded_and_saved_again_bit_for_bit(name, tmp_path):
    model = experts_model(architecture=name)
    model.save_pretrained(tmp_path / "one")
    again = CgcLoraModel.load(tiny_model(name), tmp_path / "one")
    assert again.structure == model.structure and again.adapter_names() == model.adapter_names()
    assert all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in model.adapter_names())
    assert all(torch.equal(logits(again, task=task), logits(model, task=task)) for task in TASKS)
    again.save_pretrained(tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 1 + len(TASKS)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / "adapter_config.json").read_bytes() == (tmp_path / "two" / "adapter_config.json").read_bytes()


def test_text_is_generated_for_the_task_that_is_named(saved):
    model, texts = CgcLoraModel.load(tiny_model("llama"), saved), set()
    for task in TASKS:
        plain = PeftModel.from_pretrained(tiny_model("llama"), saved / "tasks" / task)
        text = model.generate(IDS[:, :5], task=task, max_new_tokens=8, do_sample=False)
        assert torch.equal(text, plain.generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False))
        texts.add(tuple(text.flatten().tolist()))
    assert len(texts) == len(TASKS)


def test_generating_for_an_unknown_task_lists_the_known_ones_and_for_none_asks_for_it(saved):
    model = CgcLoraModel.load(tiny_model("llama"), saved)
    with pytest.raises(UserError) as error:
        model.generate(IDS[:, :5], task="a")
    assert all(task in str(error.value) for task in TASKS)
    with pytest.raises(UserError, match="which task"):
        model.generate(IDS[:, :5], max_new_tokens=1)


def test_a_base_model_in_bfloat16_gives_what_peft_gives_with_the_task_s_adapter(saved):
    model = CgcLoraModel.load(tiny_model("llama", dtype=torch.bfloat16), saved)
    for task in TASKS:
        plain = logits(PeftModel.from_pretrained(tiny_model("llama", dtype=torch.bfloat16), saved / "tasks" / task))
        exact = logits(CgcLoraModel.load(tiny_model("llama", dtype=torch.bfloat16).float(), saved), task=task)
        assert logits(model, task=task).dtype == torch.bfloat16
        for found in (logits(model, task=task).float(), plain.float()):
            assert (found - exact).norm() < 0.01 * exact.norm()


@needs_bitsandbytes
def test_on_a_quantised_base_it_computes_as_on_the_dequantised_weights(tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    quantised, full = load_model(config, "sdpa", torch.device("cpu")), load_model(config, "sdpa")
    layers = {name: layer for name, layer in quantised.named_modules() if isinstance(layer, Linear4bit)}
    for name, layer in layers.items():
        full.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    experts_model(base=load_model(config, "sdpa")).save_pretrained(tmp_path / "adapter")
    model, same = CgcLoraModel.load(quantised, tmp_path / "adapter"), CgcLoraModel.load(full, tmp_path / "adapter")
    assert len(layers) == len(model.layer_names)
    for task in TASKS:
        torch.testing.assert_close(logits(model, task=task), logits(same, task=task), rtol=0, atol=1e-5)


def test_a_folder_that_is_not_there_or_holds_another_adapter_is_said(saved, tmp_path):
    assert "No such file" in refused(tmp_path / "none").what
    assert "export" in refused(saved.parent).fix
    assert "type LORA, not CGC_LORA" in refused(saved / "tasks" / "math").what


def test_files_that_are_torn_or_missing_are_damage(copy):
    tensors, config = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    whole = tensors.read_bytes()
    for size in (len(whole) - 1, 20, 0):
        tensors.write_bytes(whole[:size])
        assert "damaged" in refused(copy).what
    tensors.unlink()
    assert "cannot be read" in refused(copy).what and "adapter_model.safetensors" in refused(copy).what
    tensors.write_bytes(whole)
    for text in (config.read_text()[:-9], "[]", '{"peft_type": "CGC_LORA"}'):
        config.write_text(text)
        assert "damaged" in refused(copy).what


@pytest.mark.parametrize(
    "path, value",
    [
        (["layers"], []),
        (["clusters"], []),
        (["clusters", 0, "scaling"], "2"),
        (["clusters", 0, "common"], [0]),
        (["clusters", 0, "tasks"], {}),
        (["clusters", 1, "tasks"], {"../math": [3]}),
        (["clusters", 1, "tasks"], {"a.b": [3]}),
        (["clusters", 1], {"name": "qa", "scaling": 1.0, "common": [], "tasks": {"math": []}}),
    ],
)
def test_a_config_that_makes_no_sense_is_damage(copy, path, value):
    tree = json.loads((copy / "adapter_config.json").read_text())
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copy / "adapter_config.json").write_text(json.dumps(tree))
    assert "damaged" in refused(copy).what


def test_tensors_that_are_too_many_too_few_or_of_other_shapes_do_not_fit_the_config(copy):
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    second, gate = "base_model.model.layers.1.mlp.up_proj.B:qa:math", "gates.gate:a/b"
    spoiled = [
        ({name: tensor for name, tensor in tensors.items() if name != gate}, "is not there, not [14, 4, 16]"),
        (tensors | {"more": torch.zeros(1)}, "more is [1], not expected"),
        (tensors | {second: torch.zeros(47, 8)}, "is [47, 8], not [48, 8]"),
        (tensors | {gate: torch.zeros(14, 3, 16)}, "is [14, 3, 16], not [14, 4, 16]"),
    ]
    for wrong, told in spoiled:
        save_file(wrong, file)
        assert told in refused(copy).what


def test_another_base_model_is_refused_with_the_layer_that_tells(saved):
    assert "no layer model.layers.1" in refused(saved, tiny_model("llama", num_hidden_layers=1)).what
    wide = refused(saved, tiny_model("llama", intermediate_size=64)).what
    assert "model.layers.0.mlp.gate_proj is 32 -> 64 there, 32 -> 48 in the adapter" in wide
    assert "no layer model.layers.0.self_attn.q_proj" in refused(saved, tiny_model("gpt2")).what
    odd = tiny_model("llama")
    odd.model.layers[0].self_attn.q_proj = nn.LayerNorm(32)
    assert "LayerNorm, no linear layer" in refused(saved, odd).what


def test_a_base_model_that_has_experts_already_is_refused(saved):
    base = tiny_model("llama")
    CgcLoraModel.load(base, saved)
    assert "already" in refused(saved, base).what


def test_an_initial_adapter_of_other_widths_is_refused_before_anything_is_filled(saved):
    model = experts_model(intermediate_size=64)
    before = {name: model.get_parameter(name).clone() for name in model.adapter_names()}
    with pytest.raises(UserError, match=r"is \[6, 48\] in its file, \[6, 64\] here"):
        model.load_tensors(load_file(saved / "adapter_model.safetensors"))
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
