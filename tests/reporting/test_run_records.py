import json

import numpy as np
import pytest

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import read_metrics, read_run
from mftcoder_coba.reporting.summary import best_step, sentences, task_summaries


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
