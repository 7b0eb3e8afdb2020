"""The command as a whole: with a stand-in for `train`, and once with the real one."""

import csv
import hashlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from mftcoder_coba import comparing
from mftcoder_coba import orders as orders_room
from mftcoder_coba.cli import app
from mftcoder_coba.errors import RunFailure, UserError
from mftcoder_coba.orders import orders
from mftcoder_coba.orders.tables import mean_row
from mftcoder_coba.reporting import read_run

STEPS = 4
CHANGES = (f"training.max_steps={STEPS}", "validation.every_steps=2", "training.schedule=constant")


@pytest.fixture
def call(toy, tmp_path, monkeypatch):
    """orders() with a stand-in for `train`, into tmp_path/out: what it said."""
    stand_in = Path(__file__).with_name("stand_in.py")

    def run(**arguments):
        monkeypatch.setattr(comparing, "command_of", lambda launcher, file: [sys.executable, str(stand_in), str(file), str(STEPS)])
        said = []
        monkeypatch.setattr(orders_room.showing, "draw", lambda charts, folder: [])  # the real call below draws
        defaults = {"count": 2, "methods": ["linear", "parameter_selection"], "selection_seeds": 1, "positions": 30, "overrides": CHANGES}
        arguments = defaults | arguments
        orders(toy / "toy.json", tmp_path / "out", **arguments, say=said.append)
        return said

    return run


def times(out: Path) -> dict[str, int]:
    """When each file of runs and results was written."""
    files = [path for folder in ("results", "order-*-seed1234", "merged") for path in out.glob(f"{folder}/**/*") if path.is_file()]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


def results(out: Path) -> set[str]:
    return {path.stem for path in (out / "results").iterdir()}


def losses(out: Path, name: str) -> dict[str, float]:
    return {task: values["loss"] for task, values in json.loads((out / "results" / f"{name}.json").read_text())["tasks"].items()}


def test_a_second_call_does_nothing_again(call, tmp_path):
    call()
    before = times(tmp_path / "out")
    said = call()
    assert times(tmp_path / "out") == before
    assert [line.split(": ")[1] for line in said if line.startswith(("run ", "merge "))] == ["finished before"] * 2 + ["measured before"] * 3
    assert results(tmp_path / "out") == {
        *(f"{name}{part}" for name in MERGES_OF_TWO for part in ("", "-samples")),
        *(f"order-{number}-seed1234-samples" for number in (1, 2)),
    }
    assert not any((tmp_path / "out" / "merged").iterdir())


MERGES_OF_TWO = ("linear-of-2", "parameter_selection-of-2-seed0", "parameter_selection-resampled10-of-2-seed0")


def test_orders_and_seeds_may_be_added(call, tmp_path):
    out = tmp_path / "out"
    call(methods=["parameter_selection"], resample_rounds=0)
    before = times(out)
    call(methods=["parameter_selection"], resample_rounds=0, count=3, selection_seeds=2)
    assert before.items() <= times(out).items()
    new = {"parameter_selection-of-3-seed0", "parameter_selection-of-3-seed0-samples", "parameter_selection-of-3-seed1"}
    assert results(out) - {Path(name).stem for name in before} == new | {"order-3-seed1234-samples"}
    text = (out / "orders.md").read_text()
    assert "| single models (mean of 3) |" in text and "| selection (2 seeds) |" in text


def test_what_was_interrupted_is_done_again_and_nothing_else(call, tmp_path):
    out = tmp_path / "out"
    call()
    before, expected = times(out), losses(out, "linear-of-2")
    (out / "results" / "linear-of-2.json").unlink()
    (out / "merged" / "linear-of-2").mkdir()  # killed while it was measured
    (out / "merged" / ".parameter_selection-of-2-seed0.x" / "new").mkdir(parents=True)  # killed while it was written
    said = call()
    assert [line.split(": ")[1] for line in said if line.startswith("merge ")] == ["merged and measured", *["measured before"] * 2]
    changed = {name for name, time in times(out).items() if before[name] != time}
    assert changed == {"results/linear-of-2.json"} and losses(out, "linear-of-2") == expected
    assert not any((out / "merged").iterdir())


def test_a_run_that_was_made_again_has_its_merges_measured_again(call, tmp_path):
    out = tmp_path / "out"
    call()
    before = times(out)
    file = out / "order-1-seed1234" / "best.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"value": 0.25}))
    call()
    after = times(out)
    assert {name for name in before if name.startswith("results") and before[name] == after[name]} == {"results/order-2-seed1234-samples.json"}


def test_other_samples_are_measured_anew_and_none_leave_the_imbalance_out(call, tmp_path):
    out = tmp_path / "out"
    call(positions=0)
    text = (out / "orders.md").read_text()
    assert "Rank correlation" not in text and results(out) == set(MERGES_OF_TWO)
    call(positions=10)
    before = times(out)
    call(positions=20)
    assert {name for name, time in times(out).items() if before[name] != time} == {name for name in before if name.endswith("-samples.json")}
    assert "on 20 of 280 training samples" in (out / "orders.md").read_text()


def test_kept_models_are_those_that_the_printed_commands_make(call, tmp_path):
    out = tmp_path / "out"
    call(positions=0)
    call(positions=0, keep_models=True)
    assert {path.name for path in (out / "merged").iterdir()} == set(MERGES_OF_TWO)
    call(positions=0)  # what was kept stays
    block = (out / "orders.md").read_text().split("```")[1]
    commands = dict(re.findall(r"# (.*)\n(.*)\n", block))
    assert list(commands) == list(MERGES_OF_TWO)
    for name, command in commands.items():
        words = shlex.split(command.replace(str(out / "merged"), str(tmp_path / "again")))
        assert words[:3] == ["python", "-m", "mftcoder_coba"]
        app(args=words[3:], standalone_mode=False)
        digests = [hashlib.sha256((folder / name / "model.safetensors").read_bytes()).digest() for folder in (out / "merged", tmp_path / "again")]
        assert digests[0] == digests[1]


def test_the_page_says_which_step_each_model_is_from_and_what_it_never_saw(call, tmp_path):
    call(positions=0)
    text = (tmp_path / "out" / "orders.md").read_text()
    # 280 samples fill some 15 steps: two steps are far from an epoch.
    assert "order-1 step 2 of 4 (0.1" in text and "Selected within the first epoch: order-1 after 0.1" in text
    page = (tmp_path / "out" / "orders.html").read_text()
    assert "<script" not in page and "https://" not in page and "merge --base" in page and "order-2" in page


def test_a_model_that_is_gone_is_told(call, tmp_path):
    call()
    shutil.rmtree(tmp_path / "out" / "order-2-seed1234" / "export")
    with pytest.raises(UserError, match="the run order-2-seed1234 is finished, and its model is not there") as error:
        call()
    assert "remove the run's folder" in error.value.fix


def test_a_broken_result_is_told(call, tmp_path):
    call(positions=0)
    file = tmp_path / "out" / "results" / "linear-of-2.json"
    file.write_text("{")
    with pytest.raises(UserError, match="is no result of this command") as error:
        call(positions=0)
    assert error.value.where == str(file)


def test_nothing_is_merged_where_a_run_failed(call, tmp_path, monkeypatch):
    call(count=1, methods=["linear"])
    monkeypatch.setattr(comparing, "run_to_end", lambda run, command, log: "out of luck")
    with pytest.raises(RunFailure, match="1 of 2 runs did not finish: order-2-seed1234"):
        call()
    assert not any("of-2" in name for name in results(tmp_path / "out"))


def test_the_command_line_gives_what_it_is_given(toy, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(orders_room, "orders", lambda *arguments: given.append(arguments))
    config, out = str(toy / "toy.json"), str(tmp_path)
    app(args=["orders", "--config", config, "--out", out], standalone_mode=False)
    words = "--count 3 --methods linear --methods ties --resample-rounds 2 --selection-seeds 4 --positions 9 --set run.seed=3 --keep-models"
    app(args=["orders", "--config", config, "--out", out, *words.split(), "--launcher", "deepspeed --num_gpus 2"], standalone_mode=False)
    assert given == [
        (Path(config), tmp_path, 5, [], 10, 3, 4000, [], "", False),
        (Path(config), tmp_path, 3, ["linear", "ties"], 2, 4, 9, ["run.seed=3"], "deepspeed --num_gpus 2", True),
    ]


@pytest.fixture(scope="module")
def real(toy, tmp_path_factory) -> Path:
    """LoRA adapters by real processes: one order, and then two."""
    file, out = toy / "orders.json", tmp_path_factory.mktemp("orders") / "out"
    file.write_text(json.dumps(json.loads((toy / "toy.json").read_text()) | {"adapter": {"kind": "lora", "rank": 4}}))
    orders(file, out, 1, ["parameter_selection"], 0, 1, 0, CHANGES)
    orders(file, out, 2, ["linear", "parameter_selection"], 2, 2, 60, CHANGES)
    return out


def test_real_runs_differ_in_nothing_but_the_order_seed(real):
    first, second = (json.loads((real / f"order-{number}-seed1234" / "config.json").read_text()) for number in (1, 2))
    assert [config["run"].pop("data_order_seed") for config in (first, second)] == [1, 2]
    assert [config["run"].pop("name") for config in (first, second)] == ["order-1-seed1234", "order-2-seed1234"]
    assert first == second
    runs = [read_run(real / f"order-{number}-seed1234").metrics for number in (1, 2)]
    for task in ("count", "reverse", "upper"):
        before, after = ([run.validation.of_task(task, "loss")[row] for run in runs] for row in (0, -1))
        assert before[0] == before[1] and after[0] != after[1]


def test_one_model_merged_has_the_losses_that_its_run_recorded(real):
    run = read_run(real / "order-1-seed1234")
    row = run.metrics.validation.index_of(run.best["step"])
    for task, loss in losses(real, "parameter_selection-of-1-seed0").items():
        assert loss == pytest.approx(run.metrics.validation.of_task(task, "loss")[row], rel=1e-5)


def test_a_real_call_ends_with_tables_a_figure_and_a_page(real):
    rows = list(csv.DictReader((real / "orders.csv").open()))
    values = {(row["method"], int(row["seed"]), row["task"], row["metric"]): float(row["value"]) for row in rows}
    assert len(values) == len(rows)
    start = read_run(real / "order-1-seed1234").metrics.validation.of_task("upper", "loss")[0]
    for seed in (0, 1):
        loss = losses(real, f"parameter_selection-of-2-seed{seed}")["upper"]
        assert values["selection", seed, "upper", "loss"] == loss
        assert values["selection", seed, "upper", "ratio"] == pytest.approx(loss / start, rel=1e-9)
    assert {seed for method, seed, _, metric in values if (method, metric) == (mean_row(2), "excess_correlation")} == {1, 2}
    assert (real / "figures" / "imbalance.png").stat().st_size > 10_000 and (real / "orders.html").is_file()
    text = (real / "orders.md").read_text()
    assert all(f"| {name}" in text for name in ("average", "selection (2 seeds)", "selection, resampled (2 seeds)", "best single model"))
