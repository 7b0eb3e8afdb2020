"""A run of a mixture-of-experts model records its router's loss; the config switches it off."""

import json
import shutil

import pytest
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def mixture(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    shutil.copytree(toy / "model", folder / "model")
    shutil.copytree(toy / "data", folder / "data")
    shutil.copyfile(toy / "toy.json", folder / "toy.json")
    tiny_model("mixtral", vocab_size=264).save_pretrained(folder / "model")
    return folder


def train_records(command_line, folder, processes, name, *settings):
    every = ["training.max_steps=2", "validation.every_steps=2", f"run.name={name}", *settings]
    arguments = [word for setting in every for word in ("--set", setting)]
    result = command_line(processes, "train", "--config", str(folder / "toy.json"), *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def test_the_routers_loss_is_trained_on_and_recorded(mixture, command_line):
    runs = {
        "one rank": train_records(command_line, mixture, 1, "one"),
        "ZeRO-3 on two": train_records(command_line, mixture, 2, "two", 'deepspeed={"zero_optimization":{"stage":3}}'),
        "without": train_records(command_line, mixture, 1, "none", "training.router_loss_coefficient=0"),
    }
    assert all(record["router_loss"] > 1.0 for name in ("one rank", "ZeRO-3 on two") for record in runs[name])
    assert not any("router_loss" in record for record in runs["without"])
    assert runs["one rank"][0]["loss"] == runs["without"][0]["loss"]  # the tasks' losses stay without it
    assert runs["one rank"][0]["grad_norm"] != runs["without"][0]["grad_norm"]
    for one, two in zip(runs["one rank"], runs["ZeRO-3 on two"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two["router_loss"] == pytest.approx(one["router_loss"], rel=1e-3)
