"""Nothing in a model folder is executed unless it is allowed, and nothing is written outside of the run and cache folders."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ENVIRONMENT

from mftcoder_coba.comparing import choose_methods
from mftcoder_coba.config import ModelConfig, load_config
from mftcoder_coba.data import load_tokenizer
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import load_model


class Payload:
    """Whoever unpickles this writes the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """Made only by code that a model folder brings along."""
    return tmp_path / "executed"


@pytest.fixture
def model(toy, tmp_path):
    return Path(shutil.copytree(toy / "model", tmp_path / "model"))


def load(folder, **changes):
    return load_model(ModelConfig(path=str(folder), dtype="float32", **changes), "sdpa")


def changed_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def only_a_pickle(folder, payload):
    (folder / "model.safetensors").unlink()
    torch.save(payload, folder / "pytorch_model.bin")


def pickles_in_parts(folder, payload):
    (folder / "model.safetensors").unlink()
    torch.save(payload, folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))


def an_index_that_names_a_pickle(folder, payload):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(payload, folder / "weights.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "weights.bin"}}))


def an_index_that_leaves_the_folder(folder, payload):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../other.safetensors"}}))
    torch.save(payload, folder.parent / "other.safetensors")


def a_pickle_under_another_name(folder, payload):
    torch.save(payload, folder / "model.safetensors")


def an_adapter_beside_it(folder, payload):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]})
    )
    torch.save(payload, folder / "adapter_model.bin")


REFUSED = {
    only_a_pickle: ["pytorch_model.bin", "can run any code", "python -c"],
    pickles_in_parts: ["pytorch_model-00001-of-00001.bin", "can run any code"],
    an_index_that_names_a_pickle: ["weights.bin", "model.safetensors.index.json"],
    an_index_that_leaves_the_folder: ["../other.safetensors", "model.safetensors.index.json"],
    a_pickle_under_another_name: ["damaged, or no safetensors file"],
    an_adapter_beside_it: ["adapter_config.json", "merge"],
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_weights_that_are_a_pickle_are_refused_and_not_executed(model, mark, change):
    change(model, {"a": Payload(mark)})
    with pytest.raises(UserError) as refused:
        load(model)
    for part in REFUSED[change]:
        assert part in str(refused.value)
    assert not mark.exists()


def test_pickles_beside_safetensors_are_never_read(model, mark):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        torch.save({"a": Payload(mark)}, model / name)
    load(model)
    load_tokenizer(str(model))
    assert not mark.exists()
    torch.load(model / "training_args.bin", weights_only=False)
    assert mark.exists()  # it would have been made


@pytest.mark.parametrize("harmless", [True, False])
def test_the_conversion_that_is_proposed_makes_a_folder_that_loads_and_executes_nothing(model, mark, monkeypatch, harmless):
    before = load(model)
    only_a_pickle(model, before.state_dict() if harmless else {"a": Payload(mark)})
    with pytest.raises(UserError) as refused:
        load(model)
    words = shlex.split(refused.value.fix[refused.value.fix.index("python -c") :])
    monkeypatch.setattr(sys, "argv", words[2:])
    if not harmless:
        with pytest.raises(Exception, match="[Ww]eights.only"):
            exec(words[2], {})
        assert not mark.exists()
        return
    exec(words[2], {})
    after = load(words[4])
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    load_tokenizer(words[4])


def test_a_model_whose_files_lack_a_part_of_it_is_not_filled_up_with_random_numbers(model):
    changed_json(model / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"hold nothing for model\.layers\.2\.\S+, .* and 6 more"):
        load(model)


def test_a_config_of_another_size_than_the_weights_is_refused_with_both_shapes(model):
    changed_json(model / "config.json", intermediate_size=128)
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight: \[32, 64\] in the file, \[32, 128\] in the model"):
        load(model)


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_weights_file_that_is_cut_short_is_a_mistake_of_the_folder_and_no_defect_of_the_program(model, keep):
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="damaged"):
        load(model)


def own_code(folder, mark):
    """Python code that the folder's model and tokenizer need."""
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    changed_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    changed_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})


@pytest.mark.parametrize("loader", [load, lambda folder: load_tokenizer(str(folder))], ids=["model", "tokenizer"])
def test_code_of_a_model_folder_is_not_executed_and_the_error_names_the_setting(model, mark, loader):
    own_code(model, mark)
    with pytest.raises(UserError, match=r"(?s)code of its own.*model\.trust_remote_code"):
        loader(model)
    assert not mark.exists()


def test_code_of_a_model_folder_is_executed_where_that_is_allowed(model, mark, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    own_code(model, mark)
    load(model, trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    load_tokenizer(str(model), trust_remote_code=True)
    assert mark.exists()


BAD_NAMES = [
    "..",
    ".",
    "a/b",
    "a\\b",
    "/tmp/a",
    "~",
    "",
    ".hidden",
    "a\n",
    "\na",
    "a\r",
    "a\0",
    "a b",
    "-a",
    "ａ",
    "é",
    "e\u0301",
    "a\u202e",
    "a\u2028",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a" * 129])
@pytest.mark.parametrize("key", ["run.name", "data.tasks.0.name"])
def test_a_name_cannot_leave_its_folder_nor_hide_in_it(toy, key, name):
    with pytest.raises(UserError, match=key.replace(".0", r"\[0\]")):
        load_config(toy / "toy.json", [f"{key}={json.dumps(name)}"])


@pytest.mark.parametrize("name", [*BAD_NAMES, "*", "**", "a*b"])
def test_nor_can_the_name_of_a_compared_method(toy, tmp_path, name):
    (tmp_path / "plan.json").write_text(json.dumps({name: "coba"}), encoding="utf-8")
    with pytest.raises(UserError, match="becomes a folder"):
        choose_methods(load_config(toy / "toy.json"), [], tmp_path / "plan.json")


def files_in(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def test_a_run_writes_into_its_run_folder_and_the_cache_folder_only(toy, tmp_path):
    given = shutil.copytree(toy, tmp_path / "given", ignore=shutil.ignore_patterns("cache", "runs"))
    fresh = {name: tmp_path / "elsewhere" / name.lower() for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "CWD")}
    for folder in fresh.values():
        folder.mkdir(parents=True)
    before = files_in(given)
    command = [sys.executable, "-m", "mftcoder_coba", "train", "--config", str(given / "toy.json")]
    settings = {"training.max_steps": 2, "validation.every_steps": 2, "tracking.tensorboard": "true", "model.dtype": "bfloat16"}
    settings |= {"adapter": '{"kind": "lora"}', "run.dir": tmp_path / "runs", "data.cache_dir": tmp_path / "cache"}
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = ENVIRONMENT | {name: str(folder) for name, folder in fresh.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=fresh["CWD"], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "elsewhere").rglob("*") if path not in fresh.values()) == []
    assert files_in(given) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "elsewhere", "given", "runs"]
    assert (tmp_path / "cache" / "libraries" / "matplotlib").is_dir() and (tmp_path / "runs" / "toy" / "export").is_dir()
