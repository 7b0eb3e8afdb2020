"""A user's mistakes with full models: each is told with its place and a way out, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging import merge
from mftcoder_coba.merging.folders import ShardedWriter

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def models_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("model?"))


def mistake(base: Path, models: list[Path], out: Path, method: str = "parameter_selection", **options) -> UserError:
    """What is told; nothing is left at `out`, nor beside it."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(UserError) as error:
        merge(str(base), models, method, out, **options)
    assert sorted(os.listdir(out.parent)) == before
    return error.value


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


WEIGHT_CHANGES = {
    "a tensor less": (lambda tensors: tensors.pop(WEIGHT), f"tensors that are missing here: {WEIGHT}"),
    "a tensor more": (lambda tensors: tensors.update(more=torch.ones(1)), "tensors that are here only: more"),
    "another shape": (lambda tensors: tensors.update({WEIGHT: torch.ones(47, 32)}), f"shapes: {WEIGHT} [47, 32], not [48, 32]"),
    "another dtype": (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].half()}), f"dtypes: {WEIGHT} float16, not float32"),
}


@pytest.mark.parametrize("change", WEIGHT_CHANGES)
def test_a_model_with_other_tensors_is_refused(damaged, tmp_path, change):
    changed, told = WEIGHT_CHANGES[change]
    change_weights(damaged / "model2", changed)
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert told in error.what and str(damaged / "model0") in error.what
    assert error.where == str(damaged / "model2") and error.fix


def test_all_that_differs_is_told_at_once_and_long_lists_are_cut(damaged, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "layers.1" in name]:
            del tensors[name]
        tensors[WEIGHT] = torch.ones(2)

    change_weights(damaged / "model1", change)
    change_json(damaged / "model1" / "config.json", lambda tree: tree.update(num_hidden_layers=1))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert "num_hidden_layers is 1, not 2" in error.what
    assert "and 6 more" in error.what and "shapes" in error.what


def test_a_base_of_another_shape_is_refused_and_one_in_another_dtype_is_not(damaged, write_models, tmp_path):
    change_weights(damaged / "base", WEIGHT_CHANGES["another dtype"][0])
    merge(str(damaged / "base"), models_in(damaged), "linear", tmp_path / "fine")
    change_weights(damaged / "base", WEIGHT_CHANGES["another shape"][0])
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert error.where == str(damaged / "base") and "the base does not fit" in error.what
    other = write_models("qwen2", models=1)
    assert 'model_type is "qwen2", not "llama"' in mistake(other / "base", models_in(damaged), tmp_path / "out").what


def test_a_config_that_changes_what_weights_mean_is_refused_and_one_of_training_is_not(damaged, tmp_path):
    change_json(damaged / "model1" / "config.json", lambda tree: tree.update(attention_dropout=0.1, use_cache=False, transformers_version="4.0"))
    merge(str(damaged / "base"), models_in(damaged), "linear", tmp_path / "fine")
    change_json(damaged / "model1" / "config.json", lambda tree: tree.update(rms_norm_eps=0.5))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert "config.json: rms_norm_eps is 0.5, not 1e-06" in error.what and error.where == str(damaged / "model1")


def test_another_tokenizer_is_refused(damaged, tmp_path):
    def change(tree):
        ids = tree["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]

    change_json(damaged / "model1" / "tokenizer.json", change)
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    ids = json.loads((damaged / "base" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert f'the tokenizer\'s ids: "a" is {ids["b"]}, not {ids["a"]}; "b" is {ids["a"]}, not {ids["b"]}' in error.what
    (damaged / "model1" / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be read" in mistake(damaged / "base", models_in(damaged), tmp_path / "out").what


@pytest.mark.parametrize("where", ["base", "model1"])
def test_a_quantised_model_is_refused(damaged, tmp_path, where):
    change_json(damaged / where / "config.json", lambda tree: tree.update(quantization_config={"quant_method": "bitsandbytes"}))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert "quantised (bitsandbytes)" in error.what and error.where == str(damaged / where)


def test_buffers_that_differ_and_dtypes_that_are_not_merged_are_refused(damaged, tmp_path):
    for number, path in enumerate((damaged / "base", *models_in(damaged))):
        change_weights(path, lambda tensors, number=number: tensors.update(steps=torch.tensor([number])))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert "steps (int64) differs" in error.what and error.where == str(damaged / "model1")
    change_weights(damaged / "model2", lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}))
    assert f"{WEIGHT} is stored as F8_E4M3" in mistake(damaged / "base", models_in(damaged), tmp_path / "out").what


@pytest.mark.parametrize("where", ["base", "model0", "model2"])
@pytest.mark.parametrize("damage", ["cut", "header", "empty", "missing", "no config", "config"])
def test_damaged_and_missing_files_are_refused(damaged, tmp_path, where, damage):
    weights, config = damaged / where / "model.safetensors", damaged / where / "config.json"
    match damage:
        case "cut":
            os.truncate(weights, weights.stat().st_size - 1)
        case "header":
            weights.write_bytes(b"\xff" * 100)
        case "empty":
            weights.write_bytes(b"")
        case "missing":
            weights.unlink()
        case "no config":
            config.unlink()
        case "config":
            config.write_text("[1]")
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert error.where.startswith(str(damaged / where)) and error.fix


def test_files_that_differ_from_their_index_are_refused(damaged, tmp_path):
    tensors = load_file(damaged / "model1" / "model.safetensors")
    (damaged / "model1" / "model.safetensors").unlink()
    with ShardedWriter(damaged / "model1", {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, 20_000) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    shards = sorted((damaged / "model1").glob("*.safetensors"))
    merge(str(damaged / "base"), models_in(damaged), "linear", tmp_path / "fine")
    shutil.copyfile(shards[0], shards[1])
    assert "the index and the files differ" in mistake(damaged / "base", models_in(damaged), tmp_path / "out").what
    shards[1].unlink()
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert "a weights file is missing" in error.what and error.where == str(shards[1])
    index = damaged / "model1" / "model.safetensors.index.json"
    change_json(index, lambda tree: tree["weight_map"].update({WEIGHT: "../../secret.safetensors"}))
    assert "no safetensors file of this folder" in mistake(damaged / "base", models_in(damaged), tmp_path / "out").what
    index.write_text('{"weight_map": 3}')
    assert mistake(damaged / "base", models_in(damaged), tmp_path / "out").where == str(index)


def test_pickles_are_refused(damaged, tmp_path):
    (damaged / "model0" / "model.safetensors").rename(damaged / "model0" / "pytorch_model.bin")
    assert "pickles" in mistake(damaged / "base", models_in(damaged), tmp_path / "out").what


def test_numbers_that_are_not_finite_are_told_with_their_model(damaged, tmp_path):
    change_weights(damaged / "model1", lambda tensors: tensors[WEIGHT].fill_(torch.nan))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out")
    assert WEIGHT in error.what and error.where == str(damaged / "model1")


def test_numbers_that_the_dtype_cannot_hold_are_told(damaged, tmp_path):
    for path in models_in(damaged):
        change_weights(path, lambda tensors: tensors[WEIGHT].fill_(1e6))
    error = mistake(damaged / "base", models_in(damaged), tmp_path / "out", dtype="float16")
    assert WEIGHT in error.what and error.where == "--dtype"


def test_folders_that_are_none_are_refused(llamas, adapters, tmp_path):
    out, models = tmp_path / "out", models_in(llamas)
    assert mistake(llamas / "base", [], out).where == "--models"
    assert mistake(llamas / "base", [tmp_path / "none"], out).where == str(tmp_path / "none")
    assert "neither a run nor an adapter nor a model" in mistake(llamas / "base", [tmp_path], out).what
    assert "no such folder" in mistake(Path("no such", "model folder"), models, out).what
    assert mistake(models[0] / "config.json", models, out).where == str(models[0] / "config.json")
    error = mistake(llamas / "base", [*models, adapters[0]], out)
    assert "LoRA adapter" in error.what and error.where == str(adapters[0])
    assert "the folder holds an adapter" in mistake(adapters[0], models, out).what
    (tmp_path / "out_file").write_text("kept")
    assert "something here already" in mistake(llamas / "base", models, tmp_path / "out_file").what


OPTIONS = [
    ("no_method", {}, "--method"),
    ("parameter_selection", {"probabilities": (0.5, 0.5)}, "--probabilities"),
    ("parameter_selection", {"probabilities": (0.5, 0.3, 0.1)}, "--probabilities"),
    ("parameter_selection", {"probabilities": (-0.5, 1.0, 0.5)}, "--probabilities"),
    ("parameter_selection", {"resample_rounds": -1}, "--resample-rounds"),
    ("parameter_selection", {"density": 0.5}, "--density"),
    ("linear", {"seed": 1}, "--seed"),
    ("linear", {"weight": (1.0, 2.0)}, "--weight"),
    ("linear", {"weight": (1.0, -1.0, 0.0)}, "--weight"),
    ("ties", {"density": 0.0}, "--density"),
    ("dare_ties", {"density": 1.5}, "--density"),
    ("norm_rescaled_average", {"weight": (1.0,)}, "--weight"),
    ("parameter_selection", {"rank": 4}, "--rank"),
]


@pytest.mark.parametrize(("method", "options", "where"), OPTIONS)
def test_options_that_are_wrong_are_refused_with_their_name(llamas, tmp_path, method, options, where):
    assert mistake(llamas / "base", models_in(llamas), tmp_path / "out", method, **options).where == where


def test_model_stock_needs_two_models(llamas, tmp_path):
    assert mistake(llamas / "base", models_in(llamas)[:1], tmp_path / "out", "model_stock").where == "--models"
