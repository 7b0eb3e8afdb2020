"""Whole runs of adapters with experts: what is exported, what stays as it was, what is recorded."""

import json
from pathlib import Path

import pytest
import torch
from killing import records
from safetensors.torch import load_file
from toy import TASKS
from transformers import AutoModelForCausalLM

from mftcoder_coba.config import load_config
from mftcoder_coba.data import collate, prepare
from mftcoder_coba.data.schedule import validation_rows
from mftcoder_coba.models import CgcLoraModel

CLUSTERS = {"numbers": ["count"], "letters": ["reverse", "upper"]}


def adapter(**changes) -> str:
    section = {"kind": "cgc_lora", "clusters": CLUSTERS, "common_experts": 1, "task_experts": 1, "rank": 6, "dropout": 0.05}
    return "adapter=" + json.dumps(section | changes)


@pytest.fixture(scope="module")
def train(toy, command_line):
    """(name, changes, processes, expected exit code) -> (run folder, result)."""

    def train(name, *changes, processes=1, expect=0):
        settings = [part for change in (f"run.name={name}", *changes) for part in ("--set", change)]
        result = command_line(processes, "train", "--config", str(toy / "toy.json"), *settings)
        assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
        return toy / "runs" / name, result

    return train


@pytest.fixture(scope="module")
def joint(train) -> Path:
    """All clusters in one run on two ranks, every tensor in parts, however small."""
    zero = ("deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    return train("joint", adapter(), "training.learning_rate=2e-2", *zero, processes=2)[0]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "adapter_model.safetensors")


def loss_of(model, toy, task: str) -> float:
    """Mean loss of the task's supervised validation tokens, by the model's own logits."""
    config = load_config(toy / "toy.json")
    data = prepare(config.data, config.model.path).splits["valid"][list(TASKS).index(task)]
    batch = collate(validation_rows([data.lengths], 96, "none"), [data], 1, 0, "token", isolate=False)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return (losses * batch.loss_weights).sum().item() / batch.tokens.sum()


def test_no_saved_tensor_is_empty_and_all_have_moved(joint):
    tensors = tensors_of(joint)
    model = CgcLoraModel.load(AutoModelForCausalLM.from_pretrained(joint.parents[1] / "model"), joint / "export")
    assert set(tensors) == set(model.adapter_names())
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".B:" in name or name.startswith("gates.gate:"))


@pytest.mark.parametrize("task", TASKS)
def test_the_exported_plain_adapter_of_a_task_has_the_loss_that_the_run_recorded(joint, toy, task):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy / "model"), joint / "export" / "tasks" / task)
    best = json.loads((joint / "best.json").read_text())["step"]
    (recorded,) = [record["tasks"] for record in records(joint, "validation") if record["step"] == best]
    assert loss_of(model, toy, task) == pytest.approx(recorded[task]["loss"], rel=1e-5)
    assert all(abs(loss_of(model, toy, other) - recorded[other]["loss"]) > 1e-3 for other in TASKS if other != task)


def test_gates_are_recorded_at_every_validation(joint):
    gates, validations = records(joint, "gates"), records(joint, "validation")
    assert [record["step"] for record in gates] == [record["step"] for record in validations]
    first, last = gates[0], gates[-1]
    assert len(first["layers"]) == 14 and list(first["tasks"]) == list(TASKS)
    assert first["tasks"]["upper"]["experts"] == ["letters 1", "upper 1"]
    assert all(values == [0.5, 0.5] for task in first["tasks"].values() for values in task["values"])
    for task in last["tasks"].values():
        assert all(sum(values) == pytest.approx(1, abs=2e-5) for values in task["values"])
    assert last["tasks"]["count"]["values"] != first["tasks"]["count"]["values"]


def only(toy: Path, *tasks: str) -> str:
    """An experiment with these tasks alone."""
    paths = {task: {split: [str(toy / "data" / task / f"{split}.jsonl")] for split in ("train", "valid")} for task in tasks}
    return "data.tasks=" + json.dumps([{"name": task, **of_task} for task, of_task in paths.items()])


def test_a_cluster_trained_alone_leaves_the_others_bit_for_bit(train, joint, toy):
    before = tensors_of(joint)
    alone = adapter(clusters={"letters": CLUSTERS["letters"]}, initial_adapter=str(joint / "export"))
    after = tensors_of(train("alone", alone, only(toy, "reverse", "upper"), processes=2)[0])
    assert set(after) == set(before)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "letters" in name or name.endswith((":reverse", ":upper"))
    }


def test_a_cluster_that_is_added_later_leaves_the_others_bit_for_bit(train, toy):
    first, _ = train("first", adapter(clusters={"letters": ["reverse", "upper"]}), only(toy, "reverse", "upper"))
    added = adapter(clusters={"numbers": ["count"]}, initial_adapter=str(first / "export"))
    before, after = tensors_of(first), tensors_of(train("second", added, only(toy, "count"))[0])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.rpartition(".")[2].split(":", 1)[1] for name in set(after) - set(before)} == {"numbers", "numbers:count", "count"}


def test_a_task_that_is_added_to_a_cluster_trains_its_own_experts_alone(train, toy):
    first, _ = train("one-task", adapter(clusters={"letters": ["reverse"]}), only(toy, "reverse"))
    added = adapter(clusters={"letters": ["upper"]}, initial_adapter=str(first / "export"), trained=["letters/upper"])
    before, after = tensors_of(first), tensors_of(train("two-tasks", added, only(toy, "upper"))[0])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].abs().max() > 0 for name in after if name.endswith(":upper"))


def test_the_initial_adapter_may_not_be_another_runs_plain_one(train, toy, joint):
    _, result = train("wrong", adapter(initial_adapter=str(joint / "export" / "tasks" / "count")), expect=2)
    assert "holds an adapter of the type LORA" in result.stderr and "Traceback" not in result.stderr


def test_moe_lora_is_trained_and_exported_for_each_task(train):
    run, _ = train("moe", 'adapter={"kind": "moe_lora", "experts": 4, "rank": 8}')
    assert sorted(path.name for path in (run / "export" / "tasks").iterdir()) == sorted(TASKS)
    assert records(run, "gates")[-1]["tasks"]["count"]["experts"] == ["all 1", "all 2", "all 3", "all 4"]
