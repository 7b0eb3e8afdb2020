"""Merging LoRA adapters in what they add to the weights, beside PEFT's own merging."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from experts import experts_config, experts_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging import merge
from mftcoder_coba.merging.rules import ParameterSelection
from mftcoder_coba.models import write_export

TOKENS = torch.arange(12)[None]


def updates_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Stored name -> what PEFT adds to the weight."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).base_model.model
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    with torch.no_grad():
        return {f"{name}.weight": module.get_delta_weight("default").clone() for name, module in layers.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"q_proj": 3}}, {"target_modules": ["q_proj", "down_proj"]}],
)
def test_one_adapter_comes_out_as_peft_merges_it(llamas, write_adapter, tmp_path, settings):
    adapter = write_adapter(llamas / "base", tmp_path / "adapter", **settings)
    merge(str(llamas / "base"), [adapter], "parameter_selection", tmp_path / "out")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llamas / "base"), adapter).merge_and_unload().state_dict()
    found = weights(tmp_path / "out")
    assert all(torch.allclose(tensor, expected[name], rtol=0, atol=1e-6) for name, tensor in found.items())
    changed = {name for name, tensor in weights(llamas / "base").items() if not torch.equal(tensor, found[name])}
    assert changed == set(updates_by_peft(llamas / "base", adapter))


def test_gpt2_s_transposed_weights_are_merged_as_peft_merges_them(write_models, write_adapter, tmp_path):
    base = write_models("gpt2", models=1) / "base"
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merge(str(base), [adapter], "linear", tmp_path / "full")
    merge(str(base), [adapter], "linear", tmp_path / "lora", rank=4)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(TOKENS).logits
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(TOKENS).logits
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")(TOKENS).logits
        assert not torch.allclose(full, AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits, atol=1e-3)
    assert torch.allclose(full, expected, atol=1e-5) and torch.allclose(again, expected, atol=1e-5)


def test_selection_is_element_wise_in_the_updates_and_never_in_the_factors(llamas, adapters, tmp_path):
    merge(str(llamas / "base"), adapters, "parameter_selection", tmp_path / "out", seed=2)
    merged, base = weights(tmp_path / "out"), weights(llamas / "base")
    updates = [updates_by_peft(llamas / "base", adapter) for adapter in adapters]
    rule = ParameterSelection((1 / 3,) * 3, seed=2)
    for name in updates[0]:
        each = [update[name] for update in updates]
        expected = base[name] + rule.merge(name, torch.zeros_like(each[0]), each)
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-6)
        nearest = (torch.stack(each) - (merged[name] - base[name])).abs().amin(0)
        assert nearest.max() < 1e-6
        assert torch.linalg.matrix_rank(merged[name] - base[name], rtol=1e-4) > 12  # 3 adapters of rank 4 cannot make it as a sum


def test_the_average_is_that_of_the_merged_full_models(llamas, adapters, tmp_path):
    for adapter in adapters:
        merge(str(llamas / "base"), [adapter], "linear", tmp_path / adapter.name)
    merge(str(llamas / "base"), adapters, "linear", tmp_path / "out")
    merge(str(llamas / "base"), [tmp_path / adapter.name for adapter in adapters], "linear", tmp_path / "full")
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "full")
    assert all(torch.allclose(tensor, expected[name], rtol=0, atol=1e-6) for name, tensor in found.items())


def test_a_layer_that_an_adapter_leaves_out_has_the_update_0_in_it(llamas, write_adapter, tmp_path):
    both = [
        write_adapter(llamas / "base", tmp_path / "q", target_modules=["q_proj"]),
        write_adapter(llamas / "base", tmp_path / "v", target_modules=["v_proj"]),
    ]
    merge(str(llamas / "base"), both, "linear", tmp_path / "out", weight=(0.5, 0.5))
    merged, base = weights(tmp_path / "out"), weights(llamas / "base")
    for adapter in both:
        for name, update in updates_by_peft(llamas / "base", adapter).items():
            assert torch.allclose(merged[name] - base[name], update / 2, rtol=0, atol=1e-6)


def test_a_lora_adapter_of_full_rank_is_the_merged_model(llamas, adapters, tmp_path):
    merge(str(llamas / "base"), adapters, "parameter_selection", tmp_path / "full")
    lines = merge(str(llamas / "base"), adapters, "parameter_selection", tmp_path / "lora", rank=32)
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(TOKENS).logits
        lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llamas / "base"), tmp_path / "lora")(TOKENS).logits
    assert torch.allclose(lora, full, atol=1e-4)
    assert json.loads((tmp_path / "lora" / "merge.json").read_text())["relative_error"] < 1e-5
    assert "rank 32 on 14 layers" in lines[0]


def test_a_lora_adapter_of_a_rank_has_the_error_of_the_singular_values_left_out(llamas, adapters, tmp_path):
    lines = merge(str(llamas / "base"), adapters, "parameter_selection", tmp_path / "lora", rank=6)
    tree = json.loads((tmp_path / "lora" / "merge.json").read_text())
    updates = [updates_by_peft(llamas / "base", adapter) for adapter in adapters]
    whole = lost = 0.0
    for name in updates[0]:
        each = [update[name] for update in updates]
        values = torch.linalg.svdvals(ParameterSelection((1 / 3,) * 3).merge(name, torch.zeros_like(each[0]), each).double())
        size, rest = values.square().sum().item(), values[6:].square().sum().item()
        assert tree["relative_error_of_layers"][name.removesuffix(".weight")] == pytest.approx(math.sqrt(rest / size), rel=1e-4)
        whole, lost = whole + size, lost + rest
    assert tree["relative_error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert 0.1 < tree["relative_error"] < 0.9
    assert f"{tree['relative_error']:.3g} in total" in lines[1]


def test_what_was_made_of_what_and_the_tokenizer_lie_beside_the_weights(llamas, adapters, tmp_path):
    for rank in (None, 4):
        out = tmp_path / str(rank)
        merge(str(llamas / "base"), adapters, "parameter_selection", out, rank=rank, seed=3)
        tree = json.loads((out / "merge.json").read_text())
        assert tree["method"] == "parameter_selection" and tree["options"]["seed"] == 3
        assert [entry["path"] for entry in tree["models"]] == list(map(str, adapters))
        files = [llamas / "base" / "model.safetensors", *(adapter / "adapter_model.safetensors" for adapter in adapters)]
        found = [digest for entry in [tree["base"], *tree["models"]] for digest in entry["sha256"].values()]
        assert found == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert AutoTokenizer.from_pretrained(out)("abc").input_ids == AutoTokenizer.from_pretrained(llamas / "base")("abc").input_ids
    assert json.loads((tmp_path / "4" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llamas / "base")
    assert (tmp_path / "None" / "config.json").read_bytes() == (llamas / "base" / "config.json").read_bytes()


def test_the_same_seed_gives_the_same_bytes_for_one_file_and_for_many(llamas, adapters, tmp_path):
    for out, size in (("one", 10**9), ("again", 10**9), ("many", 9000)):
        merge(str(llamas / "base"), adapters, "parameter_selection", tmp_path / out, max_shard_bytes=size)
    one = weights(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    many = {name: tensor for path in (tmp_path / "many").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert many.keys() == one.keys() and all(torch.equal(tensor, one[name]) for name, tensor in many.items())


def mistake(base: Path, models: list[Path], out: Path, **options) -> UserError:
    """What is told; nothing is left at `out`, nor beside it."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(UserError) as error:
        merge(str(base), models, "parameter_selection", out, **options)
    assert sorted(os.listdir(out.parent)) == before
    return error.value


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
    ],
)
def test_adapters_that_do_more_than_to_add_to_weights_are_refused(llamas, write_adapter, tmp_path, settings, told):
    adapter = write_adapter(llamas / "base", tmp_path / "adapter", **settings)
    error = mistake(llamas / "base", [adapter], tmp_path / "out")
    assert told in error.what and error.where.startswith(str(adapter)) and "merge_and_unload" in error.fix


def test_adapters_with_experts_are_refused_with_the_way_out(llamas, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llamas / "base")
    model = experts_model(experts_config(), base=base)
    state = {name: model.get_parameter(name) for name in model.adapter_names()}
    write_export(model, state, AutoTokenizer.from_pretrained(llamas / "base"), tmp_path / "experts")
    assert "command export" in mistake(llamas / "base", [tmp_path / "experts"], tmp_path / "out").fix


def test_adapters_of_other_models_are_refused(llamas, adapters, write_models, write_adapter, tmp_path):
    other = write_models("llama_tied", models=1) / "base"
    stranger = write_adapter(other, tmp_path / "stranger")
    error = mistake(llamas / "base", [adapters[0], stranger], tmp_path / "out")
    assert str(other) in error.what and str(stranger) in error.where
    small = write_models("phi", models=1) / "base"
    assert "does not fit the base model" in mistake(small, adapters, tmp_path / "out").what


def test_a_tied_weight_that_is_adapted_is_refused_and_may_be_had_as_an_adapter(write_models, write_adapter, tmp_path):
    base = write_models("llama_tied", models=1) / "base"
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")  # PEFT adds a copy of the base model's embedding
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, adapter / "adapter_model.safetensors")
    error = mistake(base, [adapter], tmp_path / "out")
    assert "shares its weight" in error.what and "--rank" in error.fix
    merge(str(base), [adapter], "parameter_selection", tmp_path / "out", rank=4)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_base_that_cannot_be_used_is_refused(llamas, adapters, damaged, tmp_path):
    for rank in (None, 4):
        assert "holds an adapter" in mistake(adapters[1], adapters, tmp_path / "out", rank=rank).what
        assert "no such folder" in mistake(tmp_path / "none" / "of them", adapters, tmp_path / "out", rank=rank).what
    tree = json.loads((damaged / "base" / "config.json").read_text())
    (damaged / "base" / "config.json").write_text(json.dumps(tree | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    assert "quantised" in mistake(damaged / "base", adapters, tmp_path / "out").what


def test_damaged_adapters_are_refused(llamas, adapters, tmp_path):
    copy = Path(shutil.copytree(adapters[0], tmp_path / "copy"))
    tensors = load_file(copy / "adapter_model.safetensors")
    first = next(iter(tensors))

    def told(change: dict[str, Tensor]) -> str:
        save_file(tensors | change, copy / "adapter_model.safetensors")
        return mistake(llamas / "base", [adapters[1], copy], tmp_path / "out").what

    assert "not finite" in told({first: tensors[first].fill_(torch.inf).clone()})
    assert "does not fit" in told({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32)})
    os.truncate(copy / "adapter_model.safetensors", 500)
    assert "cannot be read" in mistake(llamas / "base", [copy], tmp_path / "out").what
    (copy / "adapter_config.json").write_text("{")
    assert "config cannot be read" in mistake(llamas / "base", [copy], tmp_path / "out").what


def test_another_tokenizer_is_refused(llamas, adapters, tmp_path):
    copy = Path(shutil.copytree(adapters[0], tmp_path / "copy"))
    tree = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tree["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    error = mistake(llamas / "base", [adapters[1], copy], tmp_path / "out")
    assert "the tokenizer's ids" in error.what and error.where == str(copy)


@pytest.mark.parametrize(("options", "where"), [({"rank": 0}, "--rank"), ({"rank": 65}, "--rank"), ({"dtype": "float32"}, "--dtype")])
def test_options_that_do_not_fit_are_refused(llamas, adapters, tmp_path, options, where):
    assert mistake(llamas / "base", adapters, tmp_path / "out", **options).where == where
