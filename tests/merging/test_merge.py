"""Merging folders of full models."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from killing import kill_when
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation import evaluate
from mftcoder_coba.merging import METHODS, merge, rules
from mftcoder_coba.merging.rules import ParameterSelection

SELECTION = "parameter_selection"


def models_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("model?"))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """To the bit."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)) for name, tensor in ours.items()
    )


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.bfloat16), ("llama_tied", torch.float32), ("gpt2", torch.float16)])
def test_one_model_comes_out_bit_for_bit(write_models, tmp_path, architecture, dtype):
    folder = write_models(architecture, models=1, dtype=dtype)
    merge(str(folder / "base"), models_in(folder), SELECTION, tmp_path / "out", resample_rounds=2)
    assert same(weights(tmp_path / "out"), weights(folder / "model0"))


def test_each_scalar_is_that_of_a_model_chosen_as_often_as_it_should_be(llamas, tmp_path):
    merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out", probabilities=(0.5, 0.2, 0.3))
    merged, sources = weights(tmp_path / "out"), [weights(folder) for folder in models_in(llamas)]
    chosen = torch.cat([torch.stack([tensor == source[name] for source in sources]).flatten(1) for name, tensor in merged.items()], dim=1)
    assert chosen.any(0).all()
    for row, probability in zip(chosen.double(), (0.5, 0.2, 0.3), strict=True):
        assert abs(row.mean().item() - probability) < 5 * math.sqrt(probability * (1 - probability) / chosen.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bytes_for_any_files_and_chunks(write_models, monkeypatch, tmp_path, dtype):
    folder = write_models(dtype=dtype, update=1e-5)
    arguments = str(folder / "base"), models_in(folder), SELECTION
    options = {"seed": 4, "resample_rounds": 3}
    merge(*arguments, tmp_path / "first", **options)
    merge(*arguments, tmp_path / "again", **options)
    merge(*arguments, tmp_path / "shards", max_shard_bytes=9000, **options)
    monkeypatch.setattr(rules, "CHUNK_SCALARS", 64)
    merge(*arguments, tmp_path / "chunks", **options)
    merge(*arguments, tmp_path / "other", **options | {"seed": 5})
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "chunks" / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert same(weights(tmp_path / "shards"), weights(tmp_path / "first"))
    assert not same(weights(tmp_path / "other"), weights(tmp_path / "first"))
    merge(str(folder / "base"), [_in_shards(path, tmp_path) for path in models_in(folder)], SELECTION, tmp_path / "from_shards", **options)
    assert first == (tmp_path / "from_shards" / "model.safetensors").read_bytes()


def _in_shards(model: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(tmp_path / "inputs" / model.name, max_shard_size=9000)
    return tmp_path / "inputs" / model.name


def test_tied_weights_stay_tied(write_models, tmp_path):
    folder = write_models("llama_tied")
    merge(str(folder / "base"), models_in(folder), SELECTION, tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_stored_twice_in_all_models_is_equal_in_the_merged_one(write_models, tmp_path):
    folder = write_models("llama_tied")
    for path in (folder / "base", *models_in(folder)):
        tensors = weights(path)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors", metadata={"format": "pt"})
    merge(str(folder / "base"), models_in(folder), SELECTION, tmp_path / "out")
    merged = weights(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    layers = [f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1)]
    assert not torch.equal(merged[layers[0]], merged[layers[1]])


@pytest.mark.parametrize("method", METHODS)
def test_each_method_writes_a_model_that_transformers_loads(llamas, tmp_path, method):
    """For each, the merged model is nearer to the base than a model far from all of them, and is not the base."""
    (line,) = merge(str(llamas / "base"), models_in(llamas), method, tmp_path / "out")
    assert method in line and str(tmp_path / "out") in line
    merged, base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), weights(llamas / "base")
    assert all(0 < (merged[name] - tensor).abs().max() < 0.05 for name, tensor in base.items())
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("count abc").input_ids
        == AutoTokenizer.from_pretrained(llamas / "base")("count abc").input_ids
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (llamas / "model0" / "config.json").read_bytes()


def test_a_merged_model_is_evaluated_like_any_other(toy, tmp_path):
    models = []
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(toy / "model")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        models.append(tmp_path / f"run{seed}")
        model.save_pretrained(models[-1] / "export")  # a run folder is named as well
        AutoTokenizer.from_pretrained(toy / "model").save_pretrained(models[-1] / "export")
    merge(str(toy / "model"), models, SELECTION, tmp_path / "out")
    found, base = (evaluate(folder, toy / "toy.json", split="valid")["mean_loss"] for folder in (tmp_path / "out", toy / "model"))
    assert found != base and found == pytest.approx(base, rel=0.05)


def test_a_dtype_may_be_asked_for_and_numbers_are_rounded_once(write_models, tmp_path):
    folder = write_models(dtype=torch.bfloat16)
    models = models_in(folder)
    merge(str(folder / "base"), models, "linear", tmp_path / "wide", dtype="float32")
    merge(str(folder / "base"), models, "linear", tmp_path / "own")
    wide, own, sources = weights(tmp_path / "wide"), weights(tmp_path / "own"), [weights(model) for model in models]
    for name, tensor in wide.items():
        mean = torch.stack([source[name].double() for source in sources]).mean(0)
        assert tensor.dtype == torch.float32 and torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-9)
        assert own[name].dtype == torch.bfloat16 and torch.equal(own[name], tensor.bfloat16())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32


def test_a_base_in_another_dtype_is_taken_as_training_took_it(write_models, tmp_path):
    """Models in bfloat16 that did not change a weight equal the base rounded to bfloat16: there they are drawn again."""
    wide, narrow = write_models(), write_models(dtype=torch.bfloat16, update=1e-5)
    lines = merge(str(wide / "base"), models_in(narrow), SELECTION, tmp_path / "out", resample_rounds=100)
    assert "float32; taken as bfloat16" in lines[1]
    merged, base, sources = weights(tmp_path / "out"), weights(narrow / "base"), [weights(model) for model in models_in(narrow)]
    for name, tensor in merged.items():
        stays = torch.stack([source[name] == base[name] for source in sources]).all(0)
        assert torch.equal(tensor == base[name], stays)


def test_buffers_of_whole_numbers_are_copied(damaged, tmp_path):
    for path in (damaged / "base", *models_in(damaged)):
        save_file(weights(path) | {"steps": torch.tensor([3, 4])}, path / "model.safetensors", metadata={"format": "pt"})
    merge(str(damaged / "base"), models_in(damaged), "linear", tmp_path / "out", dtype="float16")
    assert weights(tmp_path / "out")["steps"].tolist() == [3, 4] and weights(tmp_path / "out")["steps"].dtype == torch.int64


def test_merge_json_says_what_was_made_of_what(llamas, tmp_path):
    merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out", seed=9)
    tree = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert tree["method"] == SELECTION
    assert tree["options"] == {"probabilities": [1 / 3] * 3, "resample_rounds": 0, "seed": 9}
    for entry, folder in zip([tree["base"], *tree["models"]], [llamas / "base", *models_in(llamas)], strict=True):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert entry == {"path": str(folder), "sha256": {"model.safetensors": digest}}
    assert tree["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000])
def test_a_file_that_cannot_be_written_leaves_nothing(llamas, tmp_path, limit):
    """The system refuses to write more than `limit` bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: .*File too large") as error:
            merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.where == str(tmp_path / "out") and os.listdir(tmp_path) == []


def test_an_error_in_the_middle_leaves_nothing(llamas, tmp_path, monkeypatch):
    calls = []

    def fail(self, name, base, models):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return models[0]

    monkeypatch.setattr(ParameterSelection, "merge", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_killed_merge_leaves_no_output_folder_and_can_be_made_again(write_models, tmp_path):
    folder = write_models(models=2)
    for path in (folder / "base", *models_in(folder)):  # enough to be hit
        save_file(weights(path) | {f"more.{number}": torch.ones(1 << 20) for number in range(6)}, path / "model.safetensors")
    arguments = ["merge", "--base", str(folder / "base"), "--out", str(tmp_path / "out"), "--resample-rounds", "9"]
    for model in models_in(folder):
        arguments += ["--models", str(model)]
    assert kill_when(1, tuple(arguments), lambda: any(tmp_path.glob(".out.*/new/model.safetensors")))
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path)
    merge(str(folder / "base"), models_in(folder), SELECTION, tmp_path / "out", resample_rounds=9)
    assert weights(tmp_path / "out").keys() == weights(folder / "base").keys()


def test_an_empty_folder_may_be_named_and_a_full_one_stays_as_it_is(llamas, tmp_path):
    (tmp_path / "out").mkdir()
    merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out")
    kept = shutil.copytree(tmp_path / "out", tmp_path / "kept")
    with pytest.raises(UserError, match="something here already"):
        merge(str(llamas / "base"), models_in(llamas), SELECTION, tmp_path / "out", seed=1)
    assert same(weights(tmp_path / "out"), weights(kept)) and sorted(os.listdir(tmp_path)) == ["kept", "out"]
