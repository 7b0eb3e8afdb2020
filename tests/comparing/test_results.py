"""Numbers and tables from run folders made by hand, against numbers worked out by hand.

Validations at steps 0, 10, 20, 30; the loss is 2 x ratio, the perplexity 10 x ratio.
"""

import csv
import io
import json

import numpy as np
import pytest

from mftcoder_coba.comparing import Outcome, Value, build_tables, values_of
from mftcoder_coba.comparing.results import ALL, DEVIATION, MEAN, RANGE, starts_apart
from mftcoder_coba.comparing.tables import seeds_note, to_csv, to_markdown, values_csv
from mftcoder_coba.reporting import read_run


@pytest.fixture
def outcomes(make_run):
    def mixture(method, seed, a, b, best, **more):
        return Outcome(method, seed, None, read_run(make_run(f"{method}-{seed}", {"a": a, "b": b}, best, **more)))

    def alone(task, ratios, best, every):
        run = make_run(f"single-{task}", {task: ratios}, best, every=every, train=float(every))
        return Outcome("single_task", 1, task, read_run(run))

    return [
        mixture("uniform", 1, [1, 0.6, 0.5, 0.4], [1, 0.5, 0.7, 0.9], 10, train=2.0),
        mixture("uniform", 2, [1, 0.8, 0.6, 0.6], [1, 0.6, 0.6, 0.9], 20, train=4.0),
        mixture("coba", 1, [1, 0.6, 0.4, 0.5], [1, 0.6, 0.4, 0.6], 20, train=2.0, observing=1.0),
        mixture("coba", 2, [1, 0.6, 0.5, 0.4], [1, 0.6, 0.5, 0.4], 30, train=4.0, observing=1.0),
        alone("a", [1, 0.5, 0.3, 0.4], 20, 10),
        alone("b", [1, 0.2, 0.3, 0.4], 3, 3),
    ]


@pytest.fixture
def values(outcomes):
    return values_of(outcomes, ["a", "b"], "uniform")


def value(values, method, seed, metric, task):
    found = [item.value for item in values if (item.method, item.seed, item.metric, item.task) == (method, seed, metric, task)]
    assert len(found) <= 1
    return found[0] if found else None


def test_ratio_loss_and_perplexity_are_those_of_the_selected_checkpoint(values):
    # Task a goes on to fall after step 10, but there the checkpoint is.
    assert value(values, "uniform", 1, "selected_step", ALL) == 10
    assert [value(values, "uniform", 1, metric, "a") for metric in ("ratio", "loss", "perplexity")] == pytest.approx([0.6, 1.2, 6.0])
    assert [value(values, "uniform", 1, metric, MEAN) for metric in ("ratio", "loss", "perplexity")] == pytest.approx([0.55, 1.1, 5.5])


def test_the_lowest_ratio_is_searched_over_all_validations_after_the_start(values):
    assert [value(values, "uniform", 1, "lowest_ratio", task) for task in ("a", "b", MEAN)] == pytest.approx([0.4, 0.5, 0.45])
    assert [value(values, "uniform", 1, "lowest_step", task) for task in ("a", "b")] == [30, 10]


def test_of_equal_minima_the_first_counts(values):
    assert [value(values, "uniform", 2, "lowest_step", task) for task in ("a", "b")] == [20, 10]


def test_a_task_that_only_rises_is_lowest_at_its_first_validation_after_the_start(make_run):
    run = read_run(make_run("rising", {"a": [1, 1.1, 1.2]}, 10))
    assert value(values_of([Outcome("m", 1, None, run)], ["a"], None), "m", 1, "lowest_step", "a") == 10


def test_the_spread_is_that_of_the_tasks_lowest_steps(values):
    # 30 and 10: range 20, standard deviation 10; coba: 20 and 20.
    assert [value(values, "uniform", 1, "lowest_step", kind) for kind in (RANGE, DEVIATION)] == [20, 10]
    assert [value(values, "coba", 1, "lowest_step", kind) for kind in (RANGE, DEVIATION)] == [0, 0]


def test_the_time_of_a_step_is_relative_to_uniform_of_the_same_seed(values):
    assert [value(values, "uniform", seed, "seconds_per_step", ALL) for seed in (1, 2)] == [2.0, 4.0]
    assert [value(values, "coba", seed, "relative_time", ALL) for seed in (1, 2)] == pytest.approx([3 / 2, 5 / 4])
    assert value(values, "uniform", 1, "relative_time", ALL) == 1.0


def test_without_uniform_there_is_no_relative_time(outcomes):
    assert not [item for item in values_of(outcomes, ["a", "b"], None) if item.metric == "relative_time"]


def test_observations_at_some_steps_count_by_their_part_of_the_steps(make_run):
    folder = make_run("rare", {"a": [1, 0.9]}, 10, train=2.0, observing=10.0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rare = [line for line in lines if '"kind": "balancer"' not in line or '"step": 5,' in line]  # one of ten
    (folder / "metrics.jsonl").write_text("\n".join(rare) + "\n")
    values = values_of([Outcome("m", 1, None, read_run(folder))], ["a"], None)
    assert value(values, "m", 1, "seconds_per_step", ALL) == pytest.approx(2.0 + 10.0 / 10)


def test_single_tasks_come_from_runs_of_their_own(values):
    assert [value(values, "single_task", 1, "ratio", task) for task in ("a", "b", MEAN)] == pytest.approx([0.3, 0.2, 0.25])
    assert [value(values, "single_task", 1, "selected_step", task) for task in ("a", "b", ALL)] == [20, 3, None]
    # 30 steps of 10 seconds, 9 of 3.
    assert value(values, "single_task", 1, "steps", ALL) == 30 + 9
    assert value(values, "single_task", 1, "seconds_per_step", ALL) == pytest.approx((30 * 10 + 9 * 3) / 39)
    # Their steps are on no common scale.
    assert value(values, "single_task", 1, "lowest_step", RANGE) is None


def test_a_missing_single_task_leaves_no_mean(outcomes):
    values = values_of([outcome for outcome in outcomes if outcome.task != "b"], ["a", "b"], None)
    assert value(values, "single_task", 1, "ratio", "a") == pytest.approx(0.3)
    assert value(values, "single_task", 1, "ratio", MEAN) is None


@pytest.fixture
def tables(values):
    found = build_tables(values, {"uniform": 2, "coba": 2, "single_task": 1, "famo": 0}, 2, ["a", "b"], ["single_task"])
    return {table.name: table for table in found}


def cells(table, method):
    (row,) = [row for row in table.rows if row.method == method]
    return {column.title: cell for column, cell in zip(table.columns, row.cells, strict=True)}


def test_a_cell_is_mean_and_sample_deviation_over_seeds(tables):
    # coba's mean ratios: 0.4 in both seeds; uniform's: 0.55 and 0.6.
    cell = cells(tables["overview"], "uniform")["mean ratio"]
    assert (cell.text, cell.deviation) == ("0.5750", "0.0354")
    assert cell.deviation_value == pytest.approx(np.std([0.55, 0.6], ddof=1))
    assert cells(tables["overview"], "coba")["mean ratio"].deviation == "0.0000"


def test_one_seed_has_no_deviation(tables):
    cell = cells(tables["ratio"], "single_task")["a"]
    assert (cell.text, cell.deviation) == ("0.3000", "")


def test_rows_are_ordered_by_mean_ratio_and_empty_ones_come_last(tables):
    for table in tables.values():
        assert [(row.method, row.note) for row in table.rows] == [
            ("single_task", "1 of 2 seeds"),
            ("coba", ""),
            ("uniform", ""),
            ("famo", "0 of 2 seeds"),
        ]
    assert all(cell.text == "–" for cell in cells(tables["ratio"], "famo").values())


def test_the_least_of_the_balancers_is_marked(tables):
    overview = {method: cells(tables["overview"], method) for method in ("single_task", "coba", "uniform")}
    assert [overview[method]["mean ratio"].best for method in overview] == [False, True, False]
    assert [overview[method]["relative time"].best for method in overview] == [False, False, True]
    # A step is neither good nor bad.
    assert not any(row["selected step"].best for row in overview.values())


def test_what_reads_the_same_is_marked_the_same():
    values = [Value(method, 1, "a", "ratio", ratio) for method, ratio in (("x", 0.50001), ("y", 0.50004), ("z", 0.6))]
    tables = {table.name: table for table in build_tables(values, dict.fromkeys("xyz", 1), 1, ["a"], [])}
    assert [cells(tables["ratio"], method)["a"].best for method in "xyz"] == [True, True, False]


def test_nothing_is_best_of_one():
    tables = build_tables([Value("x", 1, "a", "ratio", 0.5)], {"x": 1}, 1, ["a"], [])
    assert not any(cell.best for table in tables for row in table.rows for cell in row.cells)


def test_markdown_has_a_row_a_method_and_the_definitions_below(tables):
    text = to_markdown([tables["ratio"]], ["# Title"])
    assert "| method | a | b | mean ratio | selected step |\n|---|---:|---:|---:|---:|" in text
    assert "| coba | **0.4000 ± 0.0000** | **0.4000 ± 0.0000** | **0.4000 ± 0.0000** | 25 ± 7 |" in text
    assert "| single\\_task (1 of 2 seeds) | 0.3000 | 0.2000 | 0.2500 | – |" in text
    assert "- ratio: full validation loss (mean over tokens) over that before training, at the selected checkpoint" in text


def test_a_tables_csv_is_unrounded_and_empty_where_there_is_nothing(tables):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(tables["ratio"])))}
    assert float(rows["uniform"]["mean ratio"]) == pytest.approx(0.575)
    assert float(rows["uniform"]["a (deviation over seeds)"]) == pytest.approx(0.0)
    assert rows["famo"]["a"] == "" and rows["famo"]["note"] == "0 of 2 seeds"


def test_the_long_form_has_every_number_once(values):
    rows = list(csv.DictReader(io.StringIO(values_csv(values))))
    assert len(rows) == len(values) == len({(row["method"], row["seed"], row["task"], row["metric"]) for row in rows})
    assert [Value(row["method"], int(row["seed"]), row["task"], row["metric"], float(row["value"])) for row in rows] == values


def test_the_note_does_not_speak_of_deviations_where_there_are_none():
    assert "±" not in seeds_note(1) and "over 3 seeds" in seeds_note(3)


def test_trained_parameters_of_models_per_task_are_their_sum(make_run):
    ratios = [1, 0.9]
    outcomes = [
        Outcome("lora", 1, None, read_run(make_run("lora", {"a": ratios, "b": ratios}, 10, trained=123_456_789))),
        Outcome("each", 1, "a", read_run(make_run("each-a", {"a": ratios}, 10, trained=30))),
        Outcome("each", 1, "b", read_run(make_run("each-b", {"b": ratios}, 10, trained=30))),
        Outcome("half", 1, "a", read_run(make_run("half-a", {"a": ratios}, 10, trained=30))),
    ]
    values = values_of(outcomes, ["a", "b"], None)
    assert {v.method: v.value for v in values if v.metric == "trained_parameters"} == {"lora": 123_456_789, "each": 60}
    # All digits are shown: methods may have nearly as many.
    overview = build_tables(values, {"lora": 1, "each": 1, "half": 0}, 1, ["a", "b"], ["each", "half"], "lora")[0]
    assert {row.method: cells(overview, row.method)["trained parameters"].text for row in overview.rows} == {
        "lora": "123,456,789",
        "each": "60",
        "half": "–",
    }
    assert "trained parameters: of the model, or of the adapter; each, half: of the runs of all tasks together" in overview.notes
    assert any("over those of lora with the same seed" in note for note in overview.notes)


def test_trained_parameters_are_shown_only_where_they_differ():
    def titles(*counts):
        values = [Value(f"m{number}", 1, ALL, "trained_parameters", count) for number, count in enumerate(counts)]
        return [column.title for column in build_tables(values, {value.method: 1 for value in values}, 1, ["a"], [])[0].columns]

    assert "trained parameters" not in titles(7.0, 7.0) and "trained parameters" in titles(7.0, 8.0)


def test_a_count_has_no_deviation_over_seeds():
    values = [Value(method, seed, ALL, "trained_parameters", count) for method, count in (("x", 7.0), ("y", 8.0)) for seed in (1, 2)]
    overview = build_tables(values, {"x": 2, "y": 2}, 2, ["a"], [])[0]
    assert cells(overview, "x")["trained parameters"].deviation == ""


def test_runs_that_begin_at_other_losses_are_found(outcomes, make_run):
    assert starts_apart(outcomes, ["a", "b"]) == []
    folder = make_run("other", {"a": [1, 0.9], "b": [1, 0.9]}, 10)
    metrics = folder / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[0]["tasks"]["b"]["loss"] = 2.01
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert starts_apart([*outcomes, Outcome("other", 1, None, read_run(folder))], ["a", "b"]) == ["b"]


def test_markdown_ends_with_what_the_methods_are(tables):
    text = to_markdown([tables["ratio"]], ["# Title"], [["method", "adapter"], ["moe", '{"target_modules": "q|v"}']])
    assert text.endswith('## How it was run\n\n| method | adapter |\n|---|---|\n| moe | {"target\\_modules": "q\\|v"} |\n')
