"""The command as a whole: with a stand-in for `train`, and once with the real one."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from mftcoder_coba import comparing
from mftcoder_coba.comparing import compare
from mftcoder_coba.comparing.folder import differences, lock
from mftcoder_coba.comparing.running import command_of, is_finished, last_recorded_step, wait_for
from mftcoder_coba.errors import RunFailure, UserError
from mftcoder_coba.reporting import read_run

STEPS = 4
# A constant rate: the smallest task has a single step, and the last step of a cosine has none.
CHANGES = (f"training.max_steps={STEPS}", "validation.every_steps=2", "training.schedule=constant")


@pytest.fixture
def call(toy, tmp_path, monkeypatch):
    """compare() with a stand-in for `train`: (*overrides, failing=..., **arguments of compare) -> what it said."""

    def run(*overrides, failing=(), out=tmp_path / "out", **arguments):
        stand_in = Path(__file__).with_name("fake_train.py")
        monkeypatch.setattr(comparing, "command_of", lambda launcher, file: [sys.executable, str(stand_in), str(file), str(STEPS), *failing])
        monkeypatch.setattr(comparing.showing, "draw", lambda charts, folder: [])  # the real comparison below draws
        said = []
        arguments = {"methods": ["coba", "uniform"], "seeds": [1, 2], "say": said.append} | arguments
        try:
            compare(toy / "toy.json", out, overrides=[*CHANGES, *overrides], **arguments)
        except RunFailure as failure:
            said.append(f"RunFailure: {failure}")
        return said

    return run


def starts(out, name):
    log = out / "logs" / f"{name}.log"
    return log.read_text().count("started") if log.is_file() else 0


def test_a_second_call_runs_nothing_again(call, tmp_path):
    call()
    said = call()
    assert [line for line in said if line.startswith("run ")] == [
        f"run {number}/4 {name}: finished before"
        for number, name in enumerate(["coba-seed1", "uniform-seed1", "coba-seed2", "uniform-seed2"], start=1)
    ]
    assert {starts(tmp_path / "out", f"{name}-seed{seed}") for name in ("coba", "uniform") for seed in (1, 2)} == {1}


def test_methods_and_seeds_may_be_added(call, tmp_path):
    call(methods=["coba"], seeds=[1])
    call(methods=["coba", "uniform"], seeds=[1])
    assert [starts(tmp_path / "out", name) for name in ("coba-seed1", "uniform-seed1")] == [1, 1]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["methods"] == {"coba": {"kind": "coba"}, "uniform": {"kind": "uniform"}}


def test_a_failed_run_is_told_and_the_rest_goes_on(call, tmp_path):
    said = call(failing=["coba-seed1"])
    assert said[-1].startswith("RunFailure: 1 of 4 runs did not finish: coba-seed1.")
    (failed,) = [line for line in said if "FAILED" in line]
    assert "exit code 1" in failed and "error: out of luck" in failed
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Not finished, and left out: coba-seed1." in text and "| coba (1 of 2 seeds) |" in text
    # The same command tries it again, and only it.
    said = call()
    assert not any("RunFailure" in line for line in said)
    assert [starts(tmp_path / "out", f"{name}-seed1") for name in ("coba", "uniform")] == [2, 1]


def test_finished_runs_keep_their_numbers_and_give_back_the_disk(call, tmp_path):
    call(methods=["uniform"], seeds=[1])
    folder = tmp_path / "out" / "uniform-seed1"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl"]


def test_models_are_kept_on_demand_and_not_dropped_by_a_later_call(call, tmp_path):
    call(methods=["uniform"], seeds=[1], keep_models=True)
    call(methods=["uniform"], seeds=[1])
    assert sorted(path.name for path in (tmp_path / "out" / "uniform-seed1").iterdir()) == ["export", "metrics.jsonl"]


def test_another_experiment_in_the_same_folder_is_refused(call, tmp_path):
    call(methods=["uniform"], seeds=[1])
    with pytest.raises(UserError, match=r"training.learning_rate: was 0.005, is 0.25") as error:
        call("training.learning_rate=0.25")
    assert "give another --out" in error.value.fix
    assert starts(tmp_path / "out", "coba-seed1") == 0


def test_keys_that_an_older_version_did_not_know_have_their_defaults(call, tmp_path):
    call(methods=["uniform"], seeds=[1])
    file = tmp_path / "out" / "compare.json"
    plan = json.loads(file.read_text())
    del plan["experiment"]["training"]["router_loss_coefficient"], plan["experiment"]["data"]["tasks"][0]["metrics"]
    file.write_text(json.dumps(plan))
    call(methods=["uniform"], seeds=[1])
    assert json.loads(file.read_text())["experiment"]["training"]["router_loss_coefficient"] == "auto"
    file.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r'training.router_loss_coefficient: was "auto", is 0.5'):
        call("training.router_loss_coefficient=0.5")


def test_a_method_of_the_same_name_with_other_settings_is_refused(call, tmp_path):
    call(methods=["coba"], seeds=[1])
    plan = tmp_path / "methods.json"
    plan.write_text('{"coba": {"kind": "coba", "tau": 9.0}}')
    with pytest.raises(UserError, match=r"methods.coba.tau: was null, is 9.0"):
        call(methods=[], plan=plan)


def test_another_adapter_under_the_same_name_is_refused(call, tmp_path):
    plan = tmp_path / "methods.json"
    for rank, refused in ((4, False), (4, False), (8, True)):
        plan.write_text(json.dumps({"lora": {"adapter": {"kind": "lora", "rank": rank}}}))
        if not refused:
            call(methods=[], plan=plan, seeds=[1])
            continue
        with pytest.raises(UserError, match=r"methods.lora.adapter.rank: was 4, is 8"):
            call(methods=[], plan=plan, seeds=[1])
    assert starts(tmp_path / "out", "lora-seed1") == 1
    # The method has the experiment's balancer, and another one is another method.
    plan.write_text(json.dumps({"lora": {"adapter": {"kind": "lora", "rank": 4}}}))
    with pytest.raises(UserError, match=r'methods.lora.balancer.kind: was "coba", is "uniform"'):
        call("balancer.kind=uniform", methods=[], plan=plan, seeds=[1])


def test_a_method_that_never_began_may_change(call, tmp_path):
    plan = tmp_path / "methods.json"
    plan.write_text(json.dumps({"lora": {"adapter": {"kind": "lora", "rank": 4}}}))
    call(methods=["uniform"], plan=plan, seeds=[1], failing=["lora-seed1"])
    plan.write_text(json.dumps({"lora": {"per_task": True}}))
    call(methods=["uniform"], plan=plan, seeds=[1])
    assert [starts(tmp_path / "out", name) for name in ("uniform-seed1", "lora-count-seed1")] == [1, 1]
    plan.write_text(json.dumps({"lora": {}}))
    with pytest.raises(UserError, match="methods.lora: was null"):
        call(methods=["uniform"], plan=plan, seeds=[1])


def test_methods_are_told_with_their_sections(call, tmp_path):
    plan = tmp_path / "methods.json"
    plan.write_text('{"full": {"training": {"learning_rate": 0.5}}, "each": {"per_task": true, "adapter": {"kind": "lora", "rank": 3}}}')
    call(methods=["uniform"], plan=plan, seeds=[1])
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text.startswith("# Comparison of methods\n")
    assert "initial values of each adapter" in text and "over those of full with the same seed" in text
    rows = [line for line in text[text.index("## How it was run") :].splitlines() if line.startswith("| ")]
    assert rows[0] == "| method | balancer | adapter | learning rate |"
    assert rows[1].startswith('| full | {"kind": "coba"') and rows[1].endswith("| none: all parameters are trained | 0.5 |")
    assert rows[2].startswith('| each | none: one model per task | {"kind": "lora", "rank": 3') and rows[2].endswith("| 0.005 |")


def test_what_does_not_change_results_may_change(call):
    call(methods=["uniform"], seeds=[1])
    assert not any("RunFailure" in line for line in call("checkpoint.every_steps=1", "run.name=other", methods=["uniform"], seeds=[1]))


def test_run_folders_of_unknown_origin_are_not_taken_for_results(call, tmp_path):
    (tmp_path / "out" / "coba-seed1").mkdir(parents=True)
    with pytest.raises(UserError, match="holds the run folder coba-seed1, and no compare.json"):
        call()


def test_mistakes_are_found_before_anything_runs(call, tmp_path):
    for arguments, message in [
        ({"methods": ["cobra"]}, "did you mean"),
        ({"seeds": [-1]}, "a seed is 0 or more"),
        ({"plan": tmp_path / "none.json"}, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            call(**arguments)
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_work_in_one_folder(call, tmp_path):
    with lock(tmp_path / "out"), pytest.raises(UserError, match="another compare or orders is working"):
        call()


def test_a_run_is_finished_by_the_validation_of_its_last_step(make_run):
    folder = make_run("run", {"a": [1, 0.9, 0.8]}, 10)
    assert is_finished(folder, 20)
    # Killed in the middle of the last line, which is this validation.
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert not is_finished(folder, 20) and last_recorded_step(folder) == 20
    assert not is_finished(folder.with_name("nothing"), 20) and last_recorded_step(folder.with_name("nothing")) == 0


def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    child = "import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    log = tmp_path / "log"
    with log.open("w") as output, pytest.raises(KeyboardInterrupt):
        wait_for([sys.executable, "-c", child], output)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_broken_run_folder_fails_alone(call, tmp_path):
    call(methods=["coba", "uniform"], seeds=[1])
    file = tmp_path / "out" / "coba-seed1" / "metrics.jsonl"
    file.write_bytes(b"oops\n" + file.read_bytes())
    said = call(methods=["coba", "uniform"], seeds=[1])
    assert "is not a record" in next(line for line in said if "FAILED" in line)
    assert said[-1].startswith("RunFailure: 1 of 2 runs")


def test_the_launcher_starts_the_same_command(tmp_path):
    assert command_of("", tmp_path / "c.json")[1:] == ["-m", "mftcoder_coba", "train", "--config", str(tmp_path / "c.json")]
    launched = command_of(f"{sys.executable} --num_gpus 2", tmp_path / "c.json")
    assert launched[1:5] == ["--num_gpus", "2", "--module", "mftcoder_coba"]
    with pytest.raises(UserError, match="there is no program"):
        command_of("no-such-launcher --num_gpus 2", tmp_path / "c.json")


def test_differences_name_their_place():
    old, new = {"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "d": None}
    assert differences(old, new) == ["a.b[1]: was 2, is 3", "c: was 1, is null"]


@pytest.fixture(scope="module")
def real(toy, tmp_path_factory):
    """Two balancers with LoRA, and full-parameter models of two tasks, by real processes; and what a second call said."""
    folder, said = tmp_path_factory.mktemp("compare"), []
    config = json.loads((toy / "toy.json").read_text())
    config["data"]["tasks"] = [task for task in config["data"]["tasks"] if task["name"] != "reverse"]
    file = toy / "two.json"
    file.write_text(json.dumps(config | {"adapter": {"kind": "lora", "rank": 4}}))
    plan = folder / "plan.json"
    plan.write_text('{"full": {"per_task": true, "adapter": null, "training": {"learning_rate": 0.01}}}')
    for _ in range(2):
        said.clear()
        compare(file, folder / "out", ["coba", "uniform"], plan, seeds=[1], overrides=CHANGES, say=said.append)
    return folder / "out", said


def test_a_real_comparison_ends_with_tables_figures_and_a_page(real):
    out, said = real
    assert [line.split(": ")[1] for line in said if line.startswith("run ")] == ["finished before"] * 4
    names = {path.name for path in out.iterdir()}
    assert {"compare.md", "compare.csv", "compare.html", "compare-overview.csv", "compare-ratio.csv", "compare-lowest_step.csv"} <= names
    assert {path.name for path in (out / "figures").iterdir()} >= {"normalised_ratio.png", "mean_ratio.png", "weights.png", "coba_scores-coba.png"}
    page = (out / "compare.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert {row["method"] for row in rows} == {"coba", "uniform", "full"}
    ratios = [float(row["value"]) for row in rows if row["metric"] == "ratio"]
    assert len(ratios) == 3 * 3 and all(0 < ratio < 1 for ratio in ratios)
    # Hidden size 32, two layers; LoRA of rank 4 on q, o (32, 32), k, v (32, 16), gate, up, down (32, 64).
    lora, model = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96), 264 * 32 + 32 + 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    trained = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "trained_parameters"}
    assert trained == {"coba": lora, "uniform": lora, "full": 2 * model}
    assert f"<td>{2 * model:,}</td>" in page and "none: all parameters are trained" in page


def test_methods_of_a_seed_begin_at_the_same_state_with_the_same_data(real):
    out, _ = real
    coba, uniform = (read_run(out / f"{name}-seed1").metrics for name in ("coba", "uniform"))
    for task in ("count", "upper"):
        assert coba.validation.of_task(task, "loss")[0] == uniform.validation.of_task(task, "loss")[0]
        # CoBa's weights are equal for its first three steps. The second step's loss depends on the adapter's initial values, which the first
        # does not see behind B = 0.
        assert (coba.train.of_task(task, "loss")[:3] == uniform.train.of_task(task, "loss")[:3]).all()
        assert (coba.train.of_task(task, "tokens") == uniform.train.of_task(task, "tokens")).all()
    # Runs of single tasks begin at the same model as well.
    alone = read_run(out / "full-upper-seed1").metrics.validation
    assert alone.of_task("upper", "loss")[0] == pytest.approx(coba.validation.of_task("upper", "loss")[0], rel=1e-6)


def test_only_the_method_changes_between_runs(real):
    out, _ = real
    full = json.loads((out / "configs" / "full-count-seed1.json").read_text())
    assert full["adapter"] is None and full["training"]["learning_rate"] == 0.01 and full["balancer"] == {"kind": "uniform"}
    assert json.loads((out / "configs" / "coba-seed1.json").read_text())["adapter"]["rank"] == 4
