"""A user's mistake gives one clear message, no traceback, and exit code 2."""

import json
import shutil
import sys

import pytest

from mftcoder_coba.cli import main


@pytest.fixture
def attempt(toy, tmp_path, command_line, capfd, monkeypatch):
    """Starts a run with a changed config, and returns its message. processes 0: in this process, for what is found before any other starts."""

    def attempt(change, command="train", processes=0):
        shutil.copytree(toy / "data", tmp_path / "data")
        shutil.copytree(toy / "model", tmp_path / "model")
        tree = json.loads((toy / "toy.json").read_text(encoding="utf-8"))
        change(tree, tmp_path)
        (tmp_path / "x.json").write_text(json.dumps(tree), encoding="utf-8")
        arguments = [command, "--config", str(tmp_path / "x.json")]
        if processes:
            result = command_line(processes, *arguments, launcher=processes > 1)
            code, output = result.returncode, result.stdout + result.stderr
        else:
            monkeypatch.setattr(sys, "argv", ["mftcoder_coba", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            code, output = ended.value.code, "".join(capfd.readouterr())
        assert code == 2, output
        assert "Traceback" not in output
        assert output.count("error: ") == 1
        return output[output.index("error: ") :]

    return attempt


def setting(path, value):
    def change(tree, _):
        *parents, last = path.split(".")
        for parent in parents:
            tree = tree[parent]
        tree[last] = value

    return change


def broken_line(tree, folder):
    file = folder / "data" / "count" / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[6] = lines[6][:-5]
    file.write_text("\n".join(lines), encoding="utf-8")


def empty_task(tree, folder):
    (folder / "data" / "upper" / "train.jsonl").write_text("", encoding="utf-8")


def without_supervision(tree, folder):
    """Questions, and no answer to learn."""
    lines = [json.dumps({"chat_rounds": [{"role": "human", "content": f"question {number}"}]}) for number in range(9)]
    (folder / "data" / "upper" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")


def only_too_long(tree, folder):
    tree["data"]["sequence_length"] = 8


def two_of_one_name(tree, folder):
    tree["data"]["tasks"][1]["name"] = "count"


def no_validation_data(tree, folder):
    tree["data"]["tasks"][2]["valid"] = []
    tree["data"]["valid_fraction"] = 0.0


def too_long_validation(tree, folder):
    line = json.dumps({"chat_rounds": [{"role": "human", "content": "long " * 99}, {"role": "bot", "content": "x"}]})
    (folder / "data" / "upper" / "valid.jsonl").write_text(line, encoding="utf-8")


def missing_file(tree, folder):
    tree["data"]["tasks"][1]["train"] = ["data/absent.jsonl"]


def too_long_for_the_model(tree, folder):
    tree["data"]["sequence_length"] = 4096


def all_gradients_in_parts(tree, folder):
    tree["balancer"] = {"kind": "metaweighting", "gradients": "all"}
    tree["deepspeed"] = {"zero_optimization": {"stage": 3}}


def code_of_its_own(tree, folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}, "model_type": "own"}
    (folder / "model" / "config.json").write_text(json.dumps(config))


CASES = {
    "unknown key": (setting("training.learning_rat", 1e-5), ["unknown key training.learning_rat", 'did you mean "learning_rate"']),
    "unknown key of the balancer": (setting("balancer.tua", 5.0), ["unknown key balancer.tua", 'did you mean "tau"']),
    "unknown kind": (setting("balancer.kind", "cobra"), ["balancer.kind", 'did you mean "coba"']),
    "wrong type": (setting("training.learning_rate", "1e-5"), ["training.learning_rate", "valid number"]),
    "missing file": (missing_file, ["data/absent.jsonl", "data.tasks[1].train (reverse)"]),
    "missing model": (setting("model.path", "./nowhere"), ["nowhere"]),
    "empty task": (empty_task, ["empty", "data.tasks[2].train (upper)"]),
    "no supervised tokens": (without_supervision, ["must end with an assistant turn", "upper/train.jsonl:1"]),
    "no usable sample": (only_too_long, ["no usable training sample", "longer than sequence_length (8 tokens)", "data.tasks["]),
    "two tasks of one name": (two_of_one_name, ["two tasks have the name count"]),
    "coba without validation data": (no_validation_data, ["coba needs validation data", "upper"]),
    "validation samples that are all too long": (
        too_long_validation,
        ["coba needs validation data", "upper/valid: 0 of 1 samples used", "1 too long"],
    ),
    "rows that do not divide": (setting("training.global_batch_rows", 7), ["global_batch_rows (7)", "micro_batch_rows (2)"]),
    "broken line": (broken_line, ["train.jsonl:7"]),
    "deepspeed contradicts": (setting("deepspeed.gradient_clipping", 5.0), ["deepspeed.gradient_clipping", "5.0", "1.0"]),
    "deepspeed decides the optimizer": (setting("deepspeed.optimizer", {"type": "Adam"}), ["deepspeed.optimizer", "training.learning_rate"]),
    "all gradients under ZeRO-3": (all_gradients_in_parts, ['balancer.gradients = "all"', "ZeRO-3", '"output_layer"']),
    "a run name that leaves its folder": (setting("run.name", "../x"), ["run.name"]),
    "fixed weights of unknown tasks": (
        setting("balancer", {"kind": "fixed", "weights": {"count": 1, "revers": 1}}),
        ["balancer.weights", "reverse", "revers"],
    ),
}
# Found when the model is there, which takes a process group.
LATE = {
    "flash attention on a CPU": (setting("model.attention", "flash_attention_2"), ["no GPU", "model.attention"]),
    "too long for the model": (too_long_for_the_model, ["data.sequence_length is 4096", "128 positions"]),
    "a model with code of its own": (code_of_its_own, ["code of its own", "trust_remote_code"]),
    "unknown target modules": (setting("adapter", {"kind": "lora", "target_modules": ["q_prij"]}), ["adapter.target_modules", "q_proj"]),
}


@pytest.mark.parametrize("case", [*CASES, *LATE])
def test_a_mistake_is_told_in_one_message(attempt, case):
    change, expected = (CASES | LATE)[case]
    message = attempt(change, processes=int(case in LATE))
    for part in expected:
        assert part in message, message


def test_prepare_tells_the_same_of_data(attempt):
    assert "train.jsonl:7" in attempt(broken_line, command="prepare")


def test_under_the_launcher_one_rank_speaks_and_the_exit_code_is_kept(attempt):
    assert "micro_batch_rows x ranks (2 x 3 = 6)" in attempt(setting("checkpoint.keep", 1), processes=3)


def test_a_missing_config_file_is_named(command_line, tmp_path):
    result = command_line(1, "train", "--config", str(tmp_path / "absent.json"))
    assert result.returncode == 2 and "no such file" in result.stderr and "absent.json" in result.stderr


def test_a_finished_run_is_not_overwritten(toy, command_line, tmp_path):
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "metrics.jsonl").write_text('{"kind": "event", "step": 1, "name": "x"}\n')
    result = command_line(1, "train", "--config", str(toy / "toy.json"), "--set", f"run.dir={tmp_path / 'runs'}", "--set", "checkpoint.resume=never")
    assert result.returncode == 2 and "already holds a run" in result.stderr
