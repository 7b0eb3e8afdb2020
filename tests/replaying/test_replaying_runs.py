"""Replays of real runs: the weights are those that the run recorded, bit for bit."""

import csv
import json
import shutil

import numpy as np
import pytest
from toy import TASKS

from mftcoder_coba.errors import UserError
from mftcoder_coba.replaying import read_recording, replay, replay_variant, variants
from mftcoder_coba.replaying.feeding import equals_recorded


@pytest.fixture(scope="module")
def run_folder(toy, command_line):
    """Six steps, and eight more after a resume; paired slopes, so that slots matter, and "auto" numbers."""
    # Four rows make mini-batches long and few, so that the warm-up ends within these steps.
    changes = [
        "run.name=replayed",
        'balancer={"kind": "coba", "slope": "paired"}',
        "validation.balancer_rows_per_rank=4",
        "training.schedule=constant",
    ]
    for steps in (6, 14):
        options = [part for change in (*changes, f"training.max_steps={steps}") for part in ("--set", change)]
        result = command_line(1, "train", "--config", str(toy / "toy.json"), *options)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return toy / "runs" / "replayed"


def recorded(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    records = [record for record in lines if record["kind"] == "balancer"]
    return [record["step"] for record in records], np.array([[record["tasks"][task]["weight"] for task in TASKS] for record in records])


def test_the_runs_own_balancer_replays_bit_for_bit_also_over_a_resume(run_folder, tmp_path):
    told = replay(run_folder, out=tmp_path)
    assert "  equal to the weights that the run recorded, bit for bit" in told
    steps, weights = recorded(run_folder)
    with (tmp_path / "weights.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == steps == list(range(1, 15))
    assert np.array([[float(row[task]) for task in TASKS] for row in rows]).tobytes() == weights.tobytes()
    assert len(np.unique(weights)) > len(TASKS)  # the warm-up ended


def test_auto_comes_from_the_coverage_of_the_run(run_folder):
    recording = read_recording(run_folder)
    (named,) = (replay_variant(recording, variant) for variant in variants(recording, ['{"kind": "coba", "slope": "paired"}'], [], []))
    assert named.weights.tobytes() == recorded(run_folder)[1].tobytes()
    assert not named.variant.own


def test_another_setting_is_not_taken_for_the_runs_own(run_folder):
    recording = read_recording(run_folder)
    results = [replay_variant(recording, variant) for variant in variants(recording, ["run", "coba"], [], ["tau=5,50"])]
    assert [equals_recorded(result) for result in results] == [True, None, None, None]


def test_weights_that_differ_from_the_recorded_ones_are_told(run_folder, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("metrics.jsonl", "environment.json", "config.json"):
        shutil.copy(run_folder / name, changed)
    config = json.loads((changed / "config.json").read_text())
    config["balancer"]["tau"] = 50.0
    (changed / "config.json").write_text(json.dumps(config))
    assert any("NOT equal to the weights that the run recorded" in line for line in replay(changed))
    assert (changed / "replay" / "weights.png").is_file()


@pytest.fixture
def uniform_run(tmp_path):
    folder = tmp_path / "uniform"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"balancer": {"kind": "uniform"}, "data": {"tasks": [{"name": "a"}]}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "validation", "step": 0, "loss": 1.0, "tasks": {"a": {"loss": 1.0}}}) + "\n")
    return folder


def test_a_run_that_recorded_no_losses_is_refused(uniform_run):
    with pytest.raises(UserError, match="has recorded no validation losses after its steps; its balancer is uniform") as error:
        read_recording(uniform_run)
    assert "such as coba" in error.value.fix


def test_what_is_neither_a_run_nor_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        read_recording(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        read_recording(tmp_path / "nothing")
