"""The command `evaluate`: the losses that a run recorded, of the right model, task and split."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from killing import records
from tiny_models import tiny_model
from toy import TASKS
from transformers import AutoModelForCausalLM

from mftcoder_coba.config import load_config
from mftcoder_coba.data import collate, load_tokenizer, prepare
from mftcoder_coba.data.schedule import validation_rows
from mftcoder_coba.evaluation import evaluate
from mftcoder_coba.models import adapter_names, add_adapter, load_model, write_export
from mftcoder_coba.models.exporting import export
from mftcoder_coba.objective import MultiTaskObjective


def recorded(run: Path) -> dict:
    """The validation at the best step."""
    best = json.loads((run / "best.json").read_text())["step"]
    (record,) = [record for record in records(run, "validation") if record["step"] == best]
    return record


def loss_by_logits(folder: Path, experiment: Path, split: str, task: str) -> tuple[float, int]:
    """(mean loss, number) of the task's supervised tokens, by the own logits of a full model, each sample alone in a row."""
    config = load_config(experiment)
    data = prepare(config.data, config.model.path).splits[split][list(TASKS).index(task)]
    batch = collate(validation_rows([data.lengths], 96, "none"), [data], 1, 0, "token", isolate=False)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch.input_ids).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=-100, reduction="sum")
    return losses.item() / int(batch.tokens[0]), int(batch.tokens[0])


@pytest.mark.parametrize("kind", ["full", "lora", "cgc"])
def test_a_run_has_the_losses_that_it_recorded_at_its_best_step(trained, kind):
    found, run = evaluate(trained / "runs" / kind, split="valid"), recorded(trained / "runs" / kind)
    assert run["mean_ratio"] < 0.99
    assert list(found["tasks"]) == list(TASKS)
    for task, values in found["tasks"].items():
        assert values["loss"] == pytest.approx(run["tasks"][task]["loss"], rel=1e-6)
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-12)
        assert (values["samples"], values["tokens"]) == (16, run["tasks"][task]["tokens"])
    assert found["mean_loss"] == pytest.approx(run["loss"], rel=1e-6)


def test_losses_are_those_of_the_model_s_own_logits(trained):
    found = evaluate(trained / "runs" / "full", tasks=["count", "reverse"])
    for task, values in found["tasks"].items():
        loss, tokens = loss_by_logits(trained / "runs" / "full" / "export", trained / "toy.json", "test", task)
        assert values == {
            "samples": 5,
            "tokens": tokens,
            "loss": pytest.approx(loss, rel=1e-5),
            "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        }


def test_the_split_is_test_where_all_chosen_tasks_have_it_else_valid(trained):
    def split_of(**more) -> str:
        return evaluate(trained / "runs" / "lora", **more)["split"]

    assert split_of() == "valid"
    assert split_of(tasks=["reverse", "count"]) == "test"
    assert split_of(tasks=["reverse"], split="valid") == "valid"


def test_the_training_data_can_be_evaluated(trained):
    (values,) = evaluate(trained / "runs" / "lora", tasks=["upper"], split="train")["tasks"].values()
    assert values["samples"] == TASKS["upper"]


def test_experts_are_met_by_the_task_s_name_whichever_tasks_are_chosen(trained):
    run = recorded(trained / "runs" / "cgc")["tasks"]
    for chosen in (["upper"], ["upper", "count"]):
        found = evaluate(trained / "runs" / "cgc", tasks=chosen, split="valid")["tasks"]
        assert list(found) == [task for task in TASKS if task in chosen]
        for task, values in found.items():
            assert values["loss"] == pytest.approx(run[task]["loss"], rel=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_exported_for_a_task_has_the_task_s_loss(trained, tmp_path, merged):
    export(trained / "runs" / "cgc", tmp_path / "reverse", "reverse", merged)
    found = evaluate(tmp_path / "reverse", trained / "toy.json", split="valid")["tasks"]
    run = recorded(trained / "runs" / "cgc")["tasks"]
    assert found["reverse"]["loss"] == pytest.approx(run["reverse"]["loss"], rel=1e-5)
    assert abs(found["count"]["loss"] - run["count"]["loss"]) > 1e-4


def test_an_export_in_a_run_is_evaluated_on_the_run_s_data_and_elsewhere_on_those_of_a_config(trained, tmp_path):
    expected = evaluate(trained / "runs" / "lora")["tasks"]
    shutil.copytree(trained / "runs" / "lora" / "export", tmp_path / "adapter")
    assert evaluate(trained / "runs" / "lora" / "export")["tasks"] == expected
    assert evaluate(tmp_path / "adapter", trained / "toy.json")["tasks"] == expected


def test_a_base_model_that_has_moved_is_named(trained, tmp_path):
    expected = evaluate(trained / "runs" / "cgc")["tasks"]
    shutil.copytree(trained / "model", tmp_path / "moved")
    shutil.copytree(trained / "runs" / "cgc", tmp_path / "run")
    for file in (tmp_path / "run" / "config.json", tmp_path / "run" / "export" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(trained / "model"), str(tmp_path / "gone")))
    assert evaluate(tmp_path / "run", base_model=str(tmp_path / "moved"))["tasks"] == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
def test_a_base_model_in_4_bits_is_that_of_the_validation_in_training(tmp_path, trained):
    base, run = tmp_path / "base", tmp_path / "run"
    tiny_model("llama", vocab_size=264, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / "model" / name, base / name)
    config = load_config(trained / "toy.json", [f"model.path={base}", 'adapter={"kind": "qlora", "rank": 4}', "data.packing=none"])
    model = add_adapter(load_model(config.model, "sdpa", torch.device("cpu")), config.adapter).eval()
    with torch.no_grad():
        for name in adapter_names(model):
            model.get_parameter(name).normal_(std=0.1)
    write_export(model, {name: model.get_parameter(name) for name in adapter_names(model)}, load_tokenizer(str(base)), run / "export")
    (run / "metrics.jsonl").touch()
    (run / "config.json").write_text(config.model_dump_json())

    found = evaluate(run, tasks=["count"], split="valid")["tasks"]["count"]
    data = prepare(config.data, config.model.path).splits["valid"][0]
    batch = collate(validation_rows([data.lengths], 96, "none"), [data], 1, 0, "token", isolate=False)
    inputs = (batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(MultiTaskObjective(model, 1)(*inputs, None)[1].item() / batch.tokens[0], rel=1e-6)
    plain = evaluate(run, overrides=["adapter.kind=lora"], tasks=["count"], split="valid")["tasks"]["count"]
    assert abs(plain["loss"] - found["loss"]) > 1e-4


def test_rows_of_a_forward_pass_and_packing_change_nothing(trained):
    expected = evaluate(trained / "runs" / "cgc")["tasks"]
    for changes in ({"batch_rows": 1}, {"batch_rows": 50}, {"overrides": ["data.packing=none"]}):
        found = evaluate(trained / "runs" / "cgc", **changes)["tasks"]
        assert all(found[task]["loss"] == pytest.approx(expected[task]["loss"], rel=1e-6) for task in TASKS)


def test_the_command_prints_a_table_and_writes_the_same_as_json(trained, tmp_path, command_line):
    out = tmp_path / "new" / "results.json"
    result = command_line(1, "evaluate", str(trained / "runs" / "cgc"), "--task", "upper", "--task", "count", "--out", str(out))
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert list(found) == ["source", "split", "tasks", "mean_loss"] and (found["source"], found["split"]) == (str(trained / "runs" / "cgc"), "valid")
    assert [list(task) for task in found["tasks"].values()] == [["samples", "tokens", "loss", "perplexity"]] * 2
    assert found["mean_loss"] == pytest.approx(sum(task["loss"] for task in found["tasks"].values()) / 2, rel=1e-12)
    lines = [line.split() for line in result.stdout.splitlines()]
    for name, task in found["tasks"].items():
        assert [name, "valid", "16", str(task["tokens"]), f"{task['loss']:.4f}", f"{task['perplexity']:.3f}"] in lines
    assert ["mean", "over", "tasks", f"{found['mean_loss']:.4f}"] in lines
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]


def test_what_is_left_out_of_the_data_is_told(trained, capsys):
    found = evaluate(trained / "runs" / "lora", overrides=["data.sequence_length=36"], split="valid")
    left = [f"{task}/valid: {values['samples']} of 16 samples used" for task, values in found["tasks"].items() if values["samples"] < 16]
    printed = capsys.readouterr().out
    assert left and all(line in printed for line in left) and "too long" in printed
