import json

import numpy as np
import pytest

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import read_metrics, read_run
from mftcoder_coba.reporting.summary import balancer_name, best_step, seconds_per_step, sentences, task_summaries


def put(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def validation(step, **ratios):
    mean = sum(ratios.values()) / len(ratios)
    return {
        "kind": "validation",
        "step": step,
        "mean_ratio": mean,
        "tasks": {t: {"loss": 2 * r, "ratio": r, "perplexity": 3.0} for t, r in ratios.items()},
    }


def test_null_and_missing_values_are_nan(tmp_path):
    put(
        tmp_path,
        {"kind": "train", "step": 1, "loss": 1.0, "tasks": {"a": {"loss": None}, "b": {"loss": 2.0}}},
        {"kind": "train", "step": 2, "tasks": {"b": {"loss": 3.0}}},
    )
    train = read_metrics(tmp_path).train
    np.testing.assert_array_equal(train.steps, [1, 2])
    np.testing.assert_array_equal(train.value("loss"), [1.0, np.nan])
    np.testing.assert_array_equal(train.of_task("a", "loss"), [np.nan, np.nan])
    np.testing.assert_array_equal(train.of_task("b", "loss"), [2.0, 3.0])
    np.testing.assert_array_equal(train.of_task("c", "anything"), [np.nan, np.nan])


def test_a_torn_last_line_is_not_read(make_run):
    folder = make_run(steps=20)
    path = folder / "metrics.jsonl"
    whole = read_metrics(folder)
    path.write_bytes(path.read_bytes() + '{"kind": "train", "step": 21, "why": "é'.encode()[:-1])
    torn = read_metrics(folder)
    np.testing.assert_array_equal(torn.train.steps, whole.train.steps)
    assert torn.events == whole.events


def test_a_folder_that_is_no_run_is_a_users_mistake(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError) as error:
            read_run(folder)
        assert error.value.where == str(folder)


def test_a_broken_json_file_is_named(make_run):
    folder = make_run(steps=2)
    (folder / "best.json").write_text("{")
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert error.value.where == str(folder / "best.json")


def test_tasks_are_in_the_order_of_the_config(tmp_path):
    put(tmp_path, validation(0, b=1.0, a=1.0, c=1.0))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"tasks": [{"name": "a"}, {"name": "b"}]}}))
    assert read_run(tmp_path).tasks == ["a", "b", "c"]


def test_a_task_summary_compares_the_best_step_with_the_start(tmp_path):
    put(
        tmp_path,
        validation(0, a=1.0),
        {"kind": "train", "step": 1, "tasks": {"a": {"tokens": 5, "weight": 0.5}}},
        {"kind": "train", "step": 2, "tasks": {"a": {"tokens": 0, "weight": 0.7}}},
        validation(1, a=0.5),
        validation(2, a=0.75),
    )
    (task,) = task_summaries(read_run(tmp_path))
    assert (task.loss_before, task.loss_best, task.ratio, task.final_weight, task.train_tokens, task.presence) == (2.0, 1.0, 0.5, 0.7, 5, 0.5)


def test_best_json_decides_and_without_it_the_lowest_mean_ratio(tmp_path):
    put(tmp_path, validation(0, a=0.1), validation(5, a=0.6, b=0.6), validation(10, a=0.5, b=0.9))
    assert (best_step(read_run(tmp_path)).step, best_step(read_run(tmp_path)).recorded) == (5, False)
    (tmp_path / "best.json").write_text(json.dumps({"step": 10, "criterion": "task:a", "value": 0.5}))
    assert (best_step(read_run(tmp_path)).step, best_step(read_run(tmp_path)).recorded) == (10, True)


def test_the_summary_names_a_task_past_its_minimum_and_only_that(tmp_path):
    put(tmp_path, validation(0, a=1.0, b=1.0), validation(5, a=0.5, b=0.8), validation(10, a=0.504, b=0.9))
    text = " ".join(sentences(read_run(tmp_path)))
    assert "Past its minimum by more than 1%: b (lowest at step 5: 0.800, at step 10: 0.900)." in text


def test_the_summary_names_the_fastest_and_the_slowest_task(tmp_path):
    put(tmp_path, validation(0, a=1.0, b=1.0), validation(5, a=0.5, b=0.9), validation(10, a=0.49, b=0.5))
    assert "Fastest to converge: a, with 90% of the fall made by step 5; slowest: b, by step 10." in sentences(read_run(tmp_path))


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "train", "step": -1},
        {"kind": "train", "step": True},
        {"kind": "train", "step": 2**70},
        {"kind": "train", "step": 1, "tasks": [1]},
        {"kind": "train", "step": 1, "tasks": {"a": 3}},
        {"step": 1},
        [1],
    ],
)
def test_a_line_that_no_run_writes_is_named(tmp_path, record):
    put(tmp_path, validation(0, a=1.0), record, validation(5, a=0.5))
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert error.value.where == f"{tmp_path / 'metrics.jsonl'}:2"


@pytest.mark.parametrize(
    "name, content",
    [
        ("config", {"data": {"tasks": ["a"]}}),
        ("config", {"data": {"tasks": "a"}}),
        ("config", {"run": {"name": 3}}),
        ("config", {"balancer": "coba"}),
        ("config", [1]),
        ("best", {"step": 5}),
        ("best", {"step": "5", "criterion": "mean_ratio", "value": 1.0}),
        ("accounting", {"tasks": []}),
    ],
)
def test_a_file_that_no_run_writes_is_named(tmp_path, name, content):
    put(tmp_path, validation(0, a=1.0))
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert error.value.where == str(tmp_path / f"{name}.json") and error.value.fix


def test_a_step_lasts_as_long_as_its_median_and_what_its_balancer_looked_at(make_run):
    # 0.5 s but for the first step, and 0.25 s of the balancer after every step.
    assert seconds_per_step(read_run(make_run(steps=20))) == 0.75


def test_seconds_that_are_not_recorded_are_unknown(tmp_path):
    put(tmp_path, {"kind": "train", "step": 1})
    assert np.isnan(seconds_per_step(read_run(tmp_path)))


def test_a_method_is_written_with_a_star_where_it_looks_at_validation_losses(tmp_path):
    put(tmp_path)
    for section, name in [
        ({"kind": "famo", "signal": "validation"}, "FAMO*"),
        ({"kind": "lbtw", "signal": "train"}, "LBTW"),
        ({"kind": "coba"}, "CoBa"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({"balancer": section}))
        assert balancer_name(read_run(tmp_path)) == name
