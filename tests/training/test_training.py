"""Whole runs by the command line, on real DeepSpeed processes."""

import json
import math

import numpy as np
import pytest
import torch
from filelock import FileLock
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from toy import TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = 'adapter={"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.1}'


def settings(*changes):
    return [part for change in changes for part in ("--set", change)]


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def run(toy, command_line):
    """Trains the toy experiment with changes and returns the run folder."""

    def run(name, processes, *changes, expect=0, launcher=False):
        arguments = ["train", "--config", str(toy / "toy.json"), *settings(f"run.name={name}", *changes)]
        result = command_line(processes, *arguments, launcher=launcher)
        assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
        folder = toy / "runs" / name
        (folder / "log.txt").write_text(result.stdout, encoding="utf-8")
        return folder

    return run


@pytest.fixture(scope="module")
def full_run(run):
    return run("full", 2, "tracking.tensorboard=true", launcher=True)


def test_every_task_learns_and_the_run_folder_holds_what_it_promises(full_run):
    for name in (
        "config.json",
        "environment.json",
        "accounting.json",
        "metrics.jsonl",
        "best.json",
        "export/model.safetensors",
        "report/report.html",
    ):
        assert (full_run / name).is_file(), name
    assert list((full_run / "tensorboard").iterdir()) and list((full_run / "report").glob("*.png"))
    before, *_, last = records(full_run, "validation")
    assert before["step"] == 0 and before["mean_ratio"] == 1.0
    assert all(last["tasks"][task]["ratio"] < 0.9 for task in TASKS)
    assert [record["step"] for record in records(full_run, "train")] == list(range(1, 13))


def test_there_is_a_balancer_record_for_every_step_and_weights_sum_to_one(full_run):
    found = records(full_run, "balancer")
    assert [record["step"] for record in found] == list(range(1, 13))
    for record in found:
        assert math.isclose(sum(task["weight"] for task in record["tasks"].values()), 1.0, abs_tol=1e-12)
        assert all(task["weight"] > 0 for task in record["tasks"].values())
    assert any(len({task["weight"] for task in record["tasks"].values()}) > 1 for record in found)


def test_a_step_trains_with_the_weights_of_the_observation_before_it(full_run):
    observed = {record["step"]: record for record in records(full_run, "balancer")}
    for record in records(full_run, "train")[1:]:
        for task in TASKS:
            assert record["tasks"][task]["weight"] == observed[record["step"] - 1]["tasks"][task]["weight"]


def test_auto_is_replaced_by_what_was_used(full_run):
    text = (full_run / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["model"]["attention"] == "sdpa" and config["data"]["template"] == "mftcoder"
    assert '"auto"' not in json.dumps({key: config[key] for key in ("model", "data", "balancer", "deepspeed")})


def test_the_exported_model_loads_and_has_the_validation_loss_of_the_best_step(full_run):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(full_run / "export"), AutoTokenizer.from_pretrained(full_run / "export")
    assert model.config.use_cache  # as in the base model: a generation would be slow without
    best = json.loads((full_run / "best.json").read_text(encoding="utf-8"))
    expected = next(record for record in records(full_run, "validation") if record["step"] == best["step"])["tasks"]["reverse"]["loss"]
    total = count = 0
    for line in (full_run.parents[1] / "data" / "reverse" / "valid.jsonl").read_text(encoding="utf-8").splitlines():
        prompt, answer = (turn["content"] for turn in json.loads(line)["chat_rounds"])
        head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in (f"<s>human\n{prompt}<s>bot\n", answer))
        ids = torch.tensor([head + tail + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(head) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(head) :], reduction="sum").item()
        count += len(tail) + 1
    assert total / count == pytest.approx(expected, rel=1e-4)


def test_an_adapter_run_exports_an_adapter_that_peft_loads(run):
    folder = run("lora", 2, LORA, "deepspeed.zero_optimization.stage=3", "training.max_steps=4", "model.dtype=bfloat16")
    assert not (folder / "export" / "model.safetensors").exists()
    tensors = load_file(folder / "export" / "adapter_model.safetensors")
    assert tensors and all("lora_" in name and tensor.numel() for name, tensor in tensors.items())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    AutoPeftModelForCausalLM.from_pretrained(folder / "export")


@pytest.mark.parametrize(
    "name, processes, changes",
    [
        ("padded", 2, ["data.packing=none", "model.gradient_checkpointing=true", "balancer.slope=paired", "balancer.window=40"]),
        ("plain", 1, ["balancer.kind=uniform", "deepspeed.zero_optimization.stage=0", "training.reduction=sample"]),
        ("proportional", 2, ["balancer.kind=proportional", "deepspeed.zero_optimization.stage=1", "model.attention=eager", "model.dtype=bfloat16"]),
        ("famo", 2, ['balancer={"kind": "famo"}']),
        ("famo-validation", 1, ['balancer={"kind": "famo", "signal": "validation"}', LORA]),
        ("gradnorm", 2, ['balancer={"kind": "gradnorm"}', "deepspeed.zero_optimization.stage=3"]),
        ("gradnorm-validation", 1, ['balancer={"kind": "gradnorm", "signal": "validation"}', LORA]),
        ("metaweighting", 1, ['balancer={"kind": "metaweighting"}']),
        ("metaweighting-all", 1, ['balancer={"kind": "metaweighting", "gradients": "all"}', LORA]),
        ("lbtw", 1, ['balancer={"kind": "lbtw", "signal": "validation"}']),
        ("dwa", 1, ['balancer={"kind": "dwa", "window": 2}', "data.valid_fraction=0"]),
        ("uncertainty", 2, ['balancer={"kind": "uncertainty"}', "deepspeed.zero_optimization.stage=3"]),
        ("random", 1, ['balancer={"kind": "random"}']),
        (
            "fixed",
            1,
            ['balancer={"kind": "fixed", "weights": {"count": 1, "reverse": 2, "upper": 1}}', LORA, "training.max_steps=null", "training.epochs=1.5"],
        ),
    ],
)
def test_other_settings_train_as_well(run, name, processes, changes):
    folder = run(name, processes, *changes)
    first, *_, last = records(folder, "validation")
    assert last["mean_ratio"] < 1
    for record in records(folder, "train"):
        assert math.isclose(sum(task["weight"] for task in record["tasks"].values()), 1.0, abs_tol=1e-12)
        if name == "proportional":
            tokens = sum(task["tokens"] for task in record["tasks"].values())
            assert all(math.isclose(task["weight"], task["tokens"] / tokens) for task in record["tasks"].values())


def test_an_epoch_uses_every_sample_once_and_ends_in_a_short_step(run, toy):
    folder = run("epoch", 1, "training.max_steps=null", "training.epochs=1", "balancer.kind=uniform")
    accounting = json.loads((folder / "accounting.json").read_text(encoding="utf-8"))["tasks"]
    for task in TASKS:
        trained = sum(record["tasks"][task]["tokens"] for record in records(folder, "train"))
        assert trained == accounting[task]["train"]["supervised_tokens"]
    assert records(folder, "train")[-1]["epoch"] == 1.0


def test_weights_are_the_same_bits_on_four_ranks_and_the_run_proves_it(run):
    """The check of every step compares all ranks' weights; a run that ends well has passed it at each."""
    folder = run("four", 4, "training.max_steps=6")
    assert len(records(folder, "train")) == 6 and json.loads((folder / "environment.json").read_text())["world_size"] == 4


def test_early_stopping_keeps_the_best_step(run):
    folder = run(
        "stopped",
        1,
        "training.learning_rate=3.0",
        "training.max_steps=40",
        "validation.every_steps=1",
        "validation.early_stopping.patience=2",
        "balancer.kind=uniform",
    )
    events = records(folder, "event")
    assert events[-1]["name"] == "early_stop"
    validations = {record["step"]: record["mean_ratio"] for record in records(folder, "validation") if record["step"]}
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    assert best["step"] == min(validations, key=validations.get) and max(validations) == best["step"] + 2 < 40


def test_three_steps_in_a_row_without_finite_numbers_stop_the_run_with_a_checkpoint(run):
    folder = run(
        "exploded", 1, "training.learning_rate=1e30", "training.gradient_clipping=0.0", "training.warmup_steps=0", "balancer.kind=uniform", expect=1
    )
    skipped = [event["step"] for event in records(folder, "event") if event["name"] == "skipped_step"]
    assert skipped == [2, 3, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step-000004"]
    assert "NaN" not in (folder / "metrics.jsonl").read_text(encoding="utf-8")


def test_checkpoints_are_pruned_to_the_newest_and_the_best(run):
    folder = run("pruned", 1, "checkpoint.every_steps=2", "checkpoint.keep=2", "balancer.kind=uniform")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step-000010", "step-000012"]


def test_losses_of_a_task_are_finite_numbers_in_the_log(full_run):
    log = (full_run / "log.txt").read_text(encoding="utf-8")
    assert "loss before" in log and str(full_run / "export") in log and str(full_run / "report" / "report.html") in log
    assert all(np.isfinite(record["loss"]) for record in records(full_run, "train"))


def test_two_runs_never_write_to_one_folder(full_run, toy, command_line):
    with FileLock(full_run / ".lock"):
        result = command_line(1, "train", "--config", str(toy / "toy.json"), "--set", "run.name=full")
    assert result.returncode == 2 and "another run is writing to this run folder" in result.stderr
