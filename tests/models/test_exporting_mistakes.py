"""The command `export` and a user's mistakes: each is told with its place and a way out, and leaves nothing behind."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from experts import TASKS
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models.exporting import export


def mistake(source: Path, out: Path, *arguments, **more) -> UserError:
    """What is told; nothing is left at `out`."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        export(source, out, *arguments, **more)
    assert sorted(out.parent.iterdir()) == before
    return error.value


def test_what_is_exported_already_or_has_no_tasks_is_refused(plain_export, llama_export, tmp_path):
    out = tmp_path / "out"
    assert "plain LoRA adapter already" in mistake(plain_export, out).what
    assert mistake(plain_export, out).where == str(plain_export / "export")
    assert "without parts" in mistake(plain_export, out, "math", merged=True).what
    full = tmp_path / "full"
    shutil.copytree(llama_export / "base", full / "export")
    for source in (full, full / "export"):
        for arguments in ({}, {"merged": True}, {"task": "math"}):
            error = mistake(source, out, **arguments)
            assert "full model already" in error.what and error.where == str(full / "export")


def test_a_source_that_holds_nothing_is_refused(llama_export, tmp_path):
    out = tmp_path / "out"
    assert "no such folder" in mistake(tmp_path / "none", out).what
    assert "neither a run nor an adapter" in mistake(tmp_path, out).what
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / "config.json").write_text("{}")
    assert "exported no model yet" in mistake(tmp_path / "new", out).what
    error = mistake(llama_export / "run", out, "mathe")
    assert all(task in str(error) for task in TASKS)


def test_options_of_merging_are_refused_where_nothing_is_merged(llama_export, tmp_path):
    assert mistake(llama_export / "run", tmp_path / "out", dtype="float32").where == "--dtype"
    assert mistake(llama_export / "run", tmp_path / "out", base_model=str(llama_export / "base")).where == "--base-model"


def test_other_kinds_of_adapters_pickles_and_damaged_ones_are_refused(llama_export, plain_export, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(plain_export / "export", copy)
    tree = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(tree | {"peft_type": "IA3"}))
    assert "of the type IA3" in mistake(copy, out, merged=True).what
    (copy / "adapter_config.json").write_text("{")
    assert "cannot be read" in mistake(copy, out, merged=True).what
    (copy / "adapter_config.json").write_text(json.dumps(tree))
    (copy / "adapter_model.safetensors").write_bytes((copy / "adapter_model.safetensors").read_bytes()[:-1])
    assert "tensors cannot be read" in mistake(copy, out, merged=True).what
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    assert "pickle" in mistake(copy, out, merged=True).what
    shutil.copytree(llama_export / "run" / "export", tmp_path / "experts")
    (tmp_path / "experts" / "tasks" / "c" / "adapter_model.safetensors").unlink()
    assert "tensors cannot be read" in mistake(tmp_path / "experts", out, "c").what


def test_a_base_model_that_the_adapter_is_not_of_is_refused(llama_export, plain_export, tmp_path):
    def told(model: nn.Module, name: str, source: Path = plain_export, task: str | None = None) -> str:
        model.save_pretrained(tmp_path / name)
        error = mistake(source, tmp_path / "out", task, merged=True, base_model=str(tmp_path / name))
        assert "does not fit the base model" in error.what and "--base-model" in error.fix
        return error.what

    assert "size mismatch" in told(tiny_model("llama", intermediate_size=64), "wide")
    assert "layers.2" in told(tiny_model("llama", num_hidden_layers=3), "deep", llama_export / "run", "c")
    assert "layers.1" in told(tiny_model("llama", num_hidden_layers=1), "shallow")
    told(tiny_model("gpt2"), "gpt2")
    told(tiny_model("llama", intermediate_size=64), "wide_too", llama_export / "run", "c")


def test_a_base_model_that_cannot_be_loaded_is_said_with_what_to_do(llama_export, tmp_path):
    def told(**changes) -> UserError:
        folder = tmp_path / "-".join(changes)
        shutil.copytree(llama_export / "base", folder)
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(tree | changes))
        error = mistake(llama_export / "run", tmp_path / "out", "c", merged=True, base_model=str(folder))
        assert str(folder) in error.where
        return error

    assert "--dtype" in told(dtype=None).fix
    assert "quantised already" in told(quantization_config={"quant_method": "gptq", "bits": 4}).what
    assert "cannot be loaded" in told(model_type="unheard_of").what
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    assert "add --trust-remote-code" in told(model_type="unheard_of", auto_map=code).fix


def test_a_base_model_that_has_moved_or_is_not_named_is_said(llama_export, tmp_path):
    def told(base: str | None) -> UserError:
        for file in (tmp_path / "run" / "export").rglob("adapter_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        error = mistake(tmp_path / "run", tmp_path / "m", "c", merged=True)
        assert "--base-model" in error.fix
        return error

    shutil.copytree(llama_export / "run", tmp_path / "run")
    moved = told(str(tmp_path / "moved"))
    assert (moved.what, moved.where) == ("no such folder", str(tmp_path / "moved"))
    assert "does not name its base model" in told(None).what


def test_a_layer_that_shares_its_weight_with_the_embedding_cannot_be_merged(make_export, tmp_path):
    made = make_export("llama_tied", target_modules=["q_proj", "lm_head"])
    assert "share their weight" in mistake(made / "run", tmp_path / "out", "c", merged=True).what


def test_numbers_that_are_not_finite_are_not_merged(plain_export, tmp_path):
    shutil.copytree(plain_export / "export", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(tensors, tmp_path / "copy" / "adapter_model.safetensors")
    assert "not finite" in mistake(tmp_path / "copy", tmp_path / "out", merged=True).what


def test_an_output_folder_with_something_in_it_is_left_alone_and_an_empty_one_is_used(llama_export, tmp_path):
    (tmp_path / "out").mkdir()
    export(llama_export / "run", tmp_path / "out", "c")
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "already" in mistake(llama_export / "run", tmp_path / "out", "math").what
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept
    (tmp_path / "file").write_text("x")
    assert "already" in mistake(llama_export / "run", tmp_path / "file", "c").what
    assert (tmp_path / "file").read_text() == "x"


def test_neighbours_of_the_output_folder_are_left_alone(llama_export, tmp_path):
    for name in ("out.new", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    export(llama_export / "run", tmp_path / "out", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new", "out.old"]
    assert all((tmp_path / name / "mine").read_text() == "x" for name in ("out.new", "out.old"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_breaks_off_leaves_nothing(llama_export, tmp_path, monkeypatch, error):
    """At the second of three tasks."""
    calls, original = [], shutil.copyfile

    def breaking(source, target):
        calls.append(source)
        if len(calls) == 3:
            raise error
        return original(source, target)

    monkeypatch.setattr(shutil, "copyfile", breaking)
    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        export(llama_export / "run", tmp_path / "out")
    assert isinstance(raised.value, KeyboardInterrupt) or "No space left" in raised.value.what
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []
