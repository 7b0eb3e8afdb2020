"""The command `export`: what it writes gives the logits of the adapter that it came from, with plain PEFT and plain transformers."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from experts import TASKS, token_ids
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from mftcoder_coba import cli
from mftcoder_coba.models import CgcLoraModel
from mftcoder_coba.models.exporting import export

ARCHITECTURES = ["llama", "llama_tied", "qwen2", "phi", "gpt_neox", "gpt2"]
IDS = token_ids()
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FULL = {"config.json", "generation_config.json", "model.safetensors"}


def logits(model: nn.Module, **task: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **task).logits.float()


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, make_export) -> Path:
    return make_export(request.param)


def base_of(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def merged_in(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def experts_of(folder: Path) -> CgcLoraModel:
    return CgcLoraModel.load(base_of(folder), folder / "run" / "export")


def test_plain_peft_gives_the_logits_of_each_task_with_its_exported_adapter(made, tmp_path):
    export(made / "run", tmp_path / "all")
    model = experts_of(made)
    assert names(tmp_path / "all") == set(TASKS)
    for task in TASKS:
        assert names(tmp_path / "all" / task) == ADAPTER | TOKENIZER
        found = logits(PeftModel.from_pretrained(base_of(made), tmp_path / "all" / task))
        torch.testing.assert_close(found, logits(model, task=task), rtol=0, atol=1e-5)
        assert (found - logits(base_of(made))).abs().max() > 1e-2


def test_plain_transformers_gives_the_logits_of_each_task_with_its_merged_model(made, tmp_path):
    export(made / "run", tmp_path / "all", merged=True)
    model = experts_of(made)
    assert names(tmp_path / "all") == set(TASKS)
    for task in TASKS:
        assert names(tmp_path / "all" / task) == FULL | TOKENIZER
        merged = merged_in(tmp_path / "all" / task)
        torch.testing.assert_close(logits(merged), logits(model, task=task), rtol=0, atol=1e-5)


def test_one_task_is_written_into_the_folder_itself_and_a_line_tells_its_size(llama_export, tmp_path):
    lines = export(llama_export / "run" / "export", tmp_path / "one", "a.b")
    assert names(tmp_path / "one") == ADAPTER | TOKENIZER
    stored = llama_export / "run" / "export" / "tasks" / "a.b"
    assert all((tmp_path / "one" / name).read_bytes() == (stored / name).read_bytes() for name in ADAPTER)
    assert all((tmp_path / "one" / name).read_bytes() == (stored.parents[1] / name).read_bytes() for name in TOKENIZER)
    size = sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert lines == [f"wrote {tmp_path / 'one'}: LoRA adapter of rank 11 of the task a.b, {size / 1024:.1f} KiB"]
    merged = export(llama_export / "run", tmp_path / "merged", "a.b", merged=True)
    assert len(merged) == 1 and "full model in float32 of the task a.b" in merged[0]
    expected = logits(experts_of(llama_export), task="a.b")
    torch.testing.assert_close(logits(merged_in(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


def test_a_merged_model_is_in_the_base_model_s_dtype_unless_another_is_asked_for(make_export, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        made = make_export("llama", dtype)
        exact = logits(CgcLoraModel.load(base_of(made).float(), made / "run" / "export"), task="math")
        for name, asked, expected in (("own", None, dtype), ("full", "float32", torch.float32)):
            out = tmp_path / f"{dtype}-{name}"
            export(made / "run", out, "math", merged=True, dtype=asked)
            assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {expected}
            merged = AutoModelForCausalLM.from_pretrained(out)
            assert merged.dtype == expected
            bound = 1e-5 if expected == torch.float32 else 0.01
            assert (logits(merged) - exact).norm() < bound * exact.norm()


def test_an_adapter_on_a_bfloat16_base_is_the_same_within_its_precision(make_export, tmp_path):
    made = make_export("llama", torch.bfloat16)
    export(made / "run", tmp_path / "all")
    exact = CgcLoraModel.load(base_of(made).float(), made / "run" / "export")
    for task in TASKS:
        found, expected = logits(PeftModel.from_pretrained(base_of(made), tmp_path / "all" / task)), logits(exact, task=task)
        assert (found - expected).norm() < 0.01 * expected.norm()
        assert (logits(experts_of(made), task=task) - expected).norm() < 0.01 * expected.norm()


def test_a_merged_model_keeps_the_base_model_s_config_and_every_file_may_be_read_by_all_who_may_read_the_folder(llama_export, tmp_path):
    export(llama_export / "run", tmp_path / "m", "c", merged=True)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "m", llama_export / "base"))
    assert ours == theirs and ours["use_cache"] is True
    mode = (tmp_path / "m").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {mode}


def test_a_plain_adapter_is_merged_with_the_base_model_s_tokenizer_where_it_has_none(plain_export, llama_export, tmp_path):
    lines = export(plain_export, tmp_path / "m", merged=True)
    assert names(tmp_path / "m") == FULL | TOKENIZER
    assert len(lines) == 1 and "of the task" not in lines[0]
    expected = logits(PeftModel.from_pretrained(base_of(llama_export), plain_export / "export"))
    torch.testing.assert_close(logits(merged_in(tmp_path / "m")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("section", [{"kind": "qlora"}, {"kind": "cgc_lora", "quantised": True}])
def test_an_adapter_of_a_quantised_run_is_merged_into_the_full_base_model_which_is_said(llama_export, tmp_path, section):
    shutil.copytree(llama_export / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"adapter": section}))
    first, *rest = export(tmp_path / "run", tmp_path / "m", "c", merged=True)
    assert "4 bits" in first and len(rest) == 1
    assert len(export(tmp_path / "run", tmp_path / "a", "c")) == 1
    torch.testing.assert_close(logits(merged_in(tmp_path / "m")), logits(experts_of(llama_export), task="c"), rtol=0, atol=1e-5)


def test_another_place_of_the_base_model_is_used_where_it_is_named(llama_export, tmp_path):
    shutil.copytree(llama_export / "run", tmp_path / "run")
    for file in (tmp_path / "run" / "export").rglob("adapter_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}))
    export(tmp_path / "run", tmp_path / "m", "c", merged=True, base_model=str(llama_export / "base"))
    torch.testing.assert_close(logits(merged_in(tmp_path / "m")), logits(experts_of(llama_export), task="c"), rtol=0, atol=1e-5)


def test_an_adapted_output_layer_that_is_also_the_embedding_is_served_as_an_adapter(make_export, tmp_path):
    made = make_export("llama_tied", target_modules=["q_proj", "lm_head"])
    export(made / "run", tmp_path / "adapter", "c")
    found = logits(PeftModel.from_pretrained(base_of(made), tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(experts_of(made), task="c"), rtol=0, atol=1e-5)


def test_a_base_model_with_code_of_its_own_is_merged_where_that_is_allowed(llama_export, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    shutil.copytree(llama_export / "base", base)
    code = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    tree = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(tree | {"model_type": "own", "auto_map": code}))
    (base / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    export(llama_export / "run", tmp_path / "m", "c", merged=True, base_model=str(base), trust_remote_code=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(merged).__name__ == "OwnModel"
    torch.testing.assert_close(logits(merged), logits(experts_of(llama_export), task="c"), rtol=0, atol=1e-5)


def test_the_command_prints_what_it_wrote_and_ends_with_2_on_a_mistake(llama_export, tmp_path, monkeypatch, capfd):
    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mftcoder_coba", "export", *arguments])
        for name in cli.keep_libraries_in.__globals__["LIBRARIES"]:
            monkeypatch.setenv(name, os.environ.get(name, str(tmp_path / "libraries")))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    run, out = str(llama_export / "run"), str(tmp_path / "out")
    assert command(run, "--out", out, "--task", "c", "--merged", "--dtype", "bfloat16") == 0
    assert capfd.readouterr().out.startswith(f"wrote {out}: full model in bfloat16 of the task c, ")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert command(run, "--out", out, "--task", "x") == 2
    told = capfd.readouterr()
    assert "error: the adapter knows no task" in told.err and "Traceback" not in told.err and told.out == ""
    assert command(run, "--out", out, "--merged", "--dtype", "float64") == 2
