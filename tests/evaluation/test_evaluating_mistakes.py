"""The command `evaluate` and a user's mistakes: one message, with its place and a way out."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from toy import TASKS, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation import evaluate
from mftcoder_coba.objective import MultiTaskObjective


def mistake(*arguments, **more) -> UserError:
    with pytest.raises(UserError) as error:
        evaluate(*arguments, **more)
    return error.value


def test_the_command_ends_with_exit_code_2_and_one_message(trained, command_line):
    result = command_line(1, "evaluate", str(trained / "runs" / "cgc"), "--task", "uper")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == ["error: the experiment has no task uper; it has count, reverse, upper", "  where: --task uper"]


def test_a_task_that_the_adapter_does_not_know_is_refused_with_the_known_ones_unless_others_are_chosen(trained, tmp_path):
    tree = json.loads((trained / "toy.json").read_text())
    tree["data"]["tasks"].append(tree["data"]["tasks"][2] | {"name": "lower"})
    other = trained / "other.json"
    other.write_text(json.dumps(tree))
    error = mistake(trained / "runs" / "cgc", other)
    assert "knows no task lower" in error.what and all(task in error.what for task in TASKS)
    assert list(evaluate(trained / "runs" / "cgc", other, tasks=["upper"])["tasks"]) == ["upper"]


def test_a_source_that_holds_no_model_or_names_no_data_is_refused(trained, tmp_path):
    assert "no such folder" in mistake(tmp_path / "none").what
    assert "no such folder" in mistake(tmp_path / "none", trained / "toy.json").what
    assert "--config" in mistake(trained / "model").fix
    assert "neither a run nor" in mistake(tmp_path, trained / "toy.json").what
    shutil.copytree(trained / "runs" / "lora", tmp_path / "early", ignore=shutil.ignore_patterns("export"))
    assert "exported no model yet" in mistake(tmp_path / "early").what


def test_a_split_without_files_or_samples_is_refused_and_names_the_tasks_that_have_some(trained, tmp_path):
    error = mistake(trained / "runs" / "lora", split="test")
    assert "no test data of upper" in error.what and "--task count --task reverse" in error.fix
    (tmp_path / "empty.jsonl").touch()
    error = mistake(trained / "runs" / "lora", overrides=[f'data.tasks.count.test=["{tmp_path / "empty.jsonl"}"]'], tasks=["count", "reverse"])
    assert "nothing can be evaluated for count" in error.what and "--task reverse" in error.fix


def test_a_full_model_has_no_base_model(trained):
    assert "no base model" in mistake(trained / "runs" / "full", base_model=str(trained / "model")).what


def test_another_base_model_than_the_adapter_s_is_used_only_where_it_is_named(trained, tmp_path):
    shutil.copytree(trained / "runs" / "full" / "export", tmp_path / "other")
    error = mistake(trained / "runs" / "lora", overrides=[f"model.path={tmp_path / 'other'}"])
    assert str(trained / "model") in error.what and str(tmp_path / "other") in error.what and "--model" in error.fix
    here, there = (evaluate(trained / "runs" / "lora", base_model=base)["mean_loss"] for base in (None, str(tmp_path / "other")))
    assert abs(here - there) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "cgc"])
def test_a_base_model_that_does_not_fit_or_is_gone_is_said(trained, tmp_path, kind):
    write_model(tmp_path / "small")
    config = AutoConfig.from_pretrained(tmp_path / "small", num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    assert "does not fit the base model" in mistake(trained / "runs" / kind, base_model=str(tmp_path / "small")).what
    error = mistake(trained / "runs" / kind, base_model=str(tmp_path / "gone"))
    assert error.what == "no such folder" and str(tmp_path / "gone") in error.where and "--model" in error.fix


def test_a_base_model_that_cannot_be_loaded_is_said_with_the_option_for_another_one(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    error = mistake(trained / "runs" / "lora", base_model=str(tmp_path / "broken"))
    assert "damaged" in error.what and "--model" in error.fix


def test_adapters_of_other_types_are_refused(trained, tmp_path):
    shutil.copytree(trained / "runs" / "lora" / "export", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
    assert "of the type IA3" in mistake(tmp_path / "adapter", trained / "toy.json").what


def test_rows_that_are_longer_than_the_model_allows_are_refused(trained):
    assert "at most 128 positions" in mistake(trained / "runs" / "lora", overrides=["data.sequence_length=200"]).what


def test_several_processes_are_refused(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in mistake(trained / "runs" / "lora").what


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(MultiTaskObjective, "forward", None)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file" / "results.json", Path("/dev/null"), Path("/proc/results.json")):
        assert mistake(trained / "runs" / "lora", out=out).where == str(out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_message_after_the_table_and_leaves_older_results(trained, tmp_path, monkeypatch, capsys):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "results.json").write_text("older")
    monkeypatch.setattr(os, "fsync", full)
    error = mistake(trained / "runs" / "lora", out=tmp_path / "results.json")
    assert "No space left" in error.what and error.where == str(tmp_path / "results.json")
    assert "mean over tasks" in capsys.readouterr().out
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.json", "older")]


def test_a_gpu_with_too_little_memory_is_told_which_option_helps(trained, monkeypatch):
    original = MultiTaskObjective.forward

    def forward(self, input_ids, *more):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, input_ids, *more)

    monkeypatch.setattr(MultiTaskObjective, "forward", forward)
    assert mistake(trained / "runs" / "lora").where == "--batch-rows"
    assert evaluate(trained / "runs" / "lora", batch_rows=1)["tasks"]
