import json
import subprocess
import sys
from pathlib import Path

import pytest

from mftcoder_coba.config import load_config
from mftcoder_coba.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path):
    def write(name, tree):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree), encoding="utf-8")
        return file

    return write


def tree(**changes):
    base = {
        "run": {"name": "x"},
        "model": {"path": "owner/model"},
        "data": {"tasks": [{"name": "a", "train": ["a.jsonl"]}, {"name": "b", "train": ["b.jsonl"]}]},
        "training": {"global_batch_rows": 8, "micro_batch_rows": 4, "learning_rate": 1e-5},
    }
    return base | changes


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.json")), ids=lambda file: file.name)
def test_every_experiment_that_we_ship_loads(file):
    load_config(file)


def test_paths_are_relative_to_the_file_that_names_them(write, tmp_path):
    write("shared/deepspeed/z.json", {"zero_optimization": {"stage": 3}})
    write("shared/base.json", {"model": {"path": "./m"}, "deepspeed": "deepspeed/z.json"})
    config = load_config(write("here/x.json", {key: value for key, value in tree(extends="../shared/base.json").items() if key != "model"}))
    assert config.model.path == str(tmp_path / "shared" / "m")
    assert config.data.tasks[0].train == [str(tmp_path / "here" / "a.jsonl")]
    assert config.zero_stage == 3


def test_a_model_that_is_no_folder_is_a_hub_id(write, tmp_path):
    file = write("x.json", tree())
    assert load_config(file).model.path == "owner/model"
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert load_config(file).model.path == str(tmp_path / "owner" / "model")


def test_later_layers_win_key_by_key(write):
    write("base.json", tree(adapter={"kind": "lora", "rank": 4}, validation={"every_steps": 7}))
    config = load_config(write("x.json", {"extends": "base.json", "adapter": {"alpha": 3}, "validation": {"every_steps": 9}}))
    assert (config.adapter.rank, config.adapter.alpha, config.validation.every_steps) == (4, 3, 9)


def test_an_object_of_another_kind_replaces_the_whole_one(write):
    write("base.json", tree(balancer={"kind": "coba", "tau": 3}))
    assert load_config(write("x.json", {"extends": "base.json", "balancer": {"kind": "uniform"}})).balancer.kind == "uniform"
    assert load_config(write("y.json", tree(balancer={"tau": 3})), ["balancer.kind=uniform"]).balancer.kind == "uniform"


def test_null_switches_an_adapter_off(write):
    write("base.json", tree(adapter={"kind": "lora"}))
    assert load_config(write("x.json", {"extends": "base.json", "adapter": None})).adapter is None


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("training.learning_rate=1e-3", lambda c: c.training.learning_rate, 1e-3),
        ("run.name=other", lambda c: c.run.name, "other"),
        ("data.tasks.b.share=2", None, None),
        ("data.tasks.1.format=messages", lambda c: c.data.tasks[1].format, "messages"),
        ("data.tasks.b.format=messages", lambda c: c.data.tasks[1].format, "messages"),
        ("training.epochs=2", lambda c: c.training.epochs, 2.0),
        ('balancer={"kind": "fixed", "weights": {"a": 1, "b": 3}}', lambda c: c.balancer.weights["b"], 3),
    ],
)
def test_overrides_take_json_or_a_string(write, override, read, value):
    file = write("x.json", tree())
    if read is None:
        with pytest.raises(UserError, match="`share` must be a number for all tasks"):
            load_config(file, [override])
    else:
        assert read(load_config(file, [override])) == value


@pytest.mark.parametrize("override", ["training", "=1", "data.tasks.c.share=1", "data.tasks.7.share=1", "run.name.first=1"])
def test_an_override_that_means_nothing_is_an_error(write, override):
    with pytest.raises(UserError) as error:
        load_config(write("x.json", tree()), [override])
    assert override in error.value.where


def test_extends_in_a_circle_is_an_error(write):
    write("a.json", {"extends": "b.json"})
    with pytest.raises(UserError, match="circle"):
        load_config(write("b.json", {"extends": "a.json"}))


def test_broken_json_is_told_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{"run": {\n  "name": }', encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "x.json")
    assert f"{tmp_path / 'x.json'}:2" in error.value.where


def test_all_findings_are_told_at_once(write):
    with pytest.raises(UserError) as error:
        load_config(write("x.json", tree(model={"path": "m", "dtipe": "float32"}, run={"name": "x", "seed": "1"})))
    assert 'unknown key model.dtipe: did you mean "dtype"?' in error.value.what and "run.seed" in error.value.what


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "", "x y"])
def test_names_that_could_leave_their_folder_are_refused(write, name):
    for change in ({"run": {"name": name}}, {"data": {"tasks": [{"name": name, "train": ["a.jsonl"]}]}}):
        with pytest.raises(UserError, match="name"):
            load_config(write("x.json", tree(**change)))


def test_a_resolved_config_is_a_config(write, tmp_path):
    config = load_config(write("x.json", tree(adapter={"kind": "lora"})))
    assert load_config(write("resolved.json", config.model_dump())) == config


def test_importing_the_config_does_not_import_torch():
    code = "import sys, mftcoder_coba.config, mftcoder_coba.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
