import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import comparison_figures, read_run, run_figures
from mftcoder_coba.reporting.comparison import ABSENT, compare, flat, sentences
from mftcoder_coba.reporting.report import build_report


def run_of(folder, ratios, config=None, start=2.0, last=10):
    """A run with the tasks of `ratios`, task -> its ratio at `last`, which is its best step."""
    folder.mkdir(parents=True)

    def validation(step, found):
        tasks = {task: {"loss": start * ratio, "ratio": ratio, "perplexity": math.exp(min(start * ratio, 700.0))} for task, ratio in found.items()}
        return {"kind": "validation", "step": step, "mean_ratio": sum(found.values()) / len(found), "tasks": tasks}

    weights = {task: {"loss": 1.0, "tokens": 1, "weight": 1 / len(ratios)} for task in ratios}
    records = [validation(0, dict.fromkeys(ratios, 1.0)), {"kind": "train", "step": last, "tasks": weights}, validation(last, ratios)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def compared_runs(*folders):
    return compare([read_run(folder) for folder in folders])


def test_runs_with_different_tasks_have_the_union_and_a_mean_over_what_is_common(tmp_path):
    found = compared_runs(run_of(tmp_path / "a", {"x": 0.5, "y": 0.7}), run_of(tmp_path / "b", {"y": 0.6, "z": 0.8}))
    assert (found.tasks, found.common_tasks) == (["x", "y", "z"], ["y"])
    first, second = found.rows()
    assert (first.mean_ratio, first.common_ratio) == (0.6, 0.7) and (second.mean_ratio, second.common_ratio) == (0.7, 0.6)
    text = " ".join(sentences(found))
    assert "3 different tasks, 1 of them common" in text and "over the 1 common task is lowest in b (0.600, step 10) and highest in a (0.700" in text


def test_only_the_settings_that_differ_are_told(tmp_path):
    tasks = [{"name": "x", "train": ["x.jsonl"], "share": 0.5}]
    one = {"run": {"name": "a", "seed": 1}, "data": {"tasks": tasks}, "balancer": {"kind": "coba", "tau": None}}
    other = {"run": {"name": "b", "seed": 1}, "data": {"tasks": [{**tasks[0], "share": 0.7}]}, "balancer": {"kind": "uniform"}}
    found = compared_runs(run_of(tmp_path / "a", {"x": 0.5}, one), run_of(tmp_path / "b", {"x": 0.5}, other), run_of(tmp_path / "c", {"x": 0.5}))
    assert {difference.key: difference.values for difference in found.differences()} == {
        "data.tasks.x.share": [0.5, 0.7, ABSENT],
        "balancer.kind": ["coba", "uniform", ABSENT],
        "balancer.tau": [None, ABSENT, ABSENT],
    }


def test_the_processes_differ_but_not_the_time_of_the_start(tmp_path):
    folders = [run_of(tmp_path / name, {"x": 0.5}) for name in "ab"]
    for number, folder in enumerate(folders, start=1):
        (folder / "environment.json").write_text(json.dumps({"world_size": number, "started": str(number), "command": [str(number)]}))
    assert [(difference.key, difference.values) for difference in compared_runs(*folders).differences()] == [("environment.world_size", [1, 2])]


def test_leaves_have_the_names_of_their_way():
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"name": "x", "f": None}]}) == {"a.b": 1, "a.c": {}, "d": [1, 2], "e.x.f": None}


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [run_of(tmp_path / sweep / "demo", {"x": 0.5}) for sweep in ("one", "two")]
    assert compared_runs(*folders).labels == ["one/demo", "two/demo"]


def test_other_losses_before_training_and_other_lengths_are_said(tmp_path):
    text = " ".join(sentences(compared_runs(run_of(tmp_path / "a", {"x": 0.5}), run_of(tmp_path / "b", {"x": 0.5}, start=3.0, last=20))))
    assert "do not start from the same validation loss of x" in text and "from 10 to 20" in text
    assert "do not start" not in " ".join(sentences(compared_runs(run_of(tmp_path / "c", {"x": 0.5}), run_of(tmp_path / "d", {"x": 0.4}))))


def test_a_run_given_twice_or_no_place_to_write_is_a_users_mistake(tmp_path, no_figures):
    one, other = run_of(tmp_path / "a", {"x": 0.5}), run_of(tmp_path / "b", {"x": 0.5})
    with pytest.raises(UserError, match="twice"):
        build_report(one, tmp_path / "b" / ".." / "a", out=tmp_path / "out")
    with pytest.raises(UserError) as error:
        build_report(one, other)
    assert error.value.where == "--out"
    with pytest.raises(UserError, match="cannot be made"):
        build_report(one, other, out=one / "metrics.jsonl")


def test_one_broken_run_is_named_and_nothing_is_written(tmp_path, no_figures):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        build_report(run_of(tmp_path / "a", {"x": 0.5}), tmp_path / "empty", out=tmp_path / "out")
    assert error.value.where == str(tmp_path / "empty") and not (tmp_path / "out").exists()


class Tables(HTMLParser):
    """The cells of every table by its label, and the texts of the summaries of runs."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.bold, self._label, self._cell = {}, [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("role") == "region":
            self._label = attributes["aria-label"]
            self.tables.setdefault(self._label, [])
        elif tag == "tr":
            self.tables[self._label].append([])
        elif tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        self._cell = tag in ("td", "th", "b", "line") or (self._cell and tag in ("svg", "wbr"))
        if tag == "b":
            self.bold.append((self._label, self.tables[self._label][-1][0]))

    def handle_data(self, data):
        if self._cell and self._label:
            self.tables[self._label][-1][-1] += data.strip()


def test_the_tables_of_the_comparison_have_a_gap_where_a_run_has_not_the_task(compared):
    tables = Tables((compared / "report.html").read_text(encoding="utf-8")).tables
    ratio = {row[0]: row[1:] for row in tables["Validation ratio"]}
    assert ratio["task"] == ["alpha", "beta", "gamma"]
    known = {task: [value != "–" for value in ratio[task]] for task in ("completion", "comment", "translate")}
    assert known == {"completion": [True, False, False], "comment": [True, True, False], "translate": [False, True, False]}
    runs = {row[0]: row[1:] for row in tables["Runs"]}
    assert runs["alpha"][:3] == ["CoBa", "100", "100"] and runs["alpha"][-1] == "0.75" and runs["gamma"][:3] == ["–", "0", "–"]
    assert {row[0]: row[1:] for row in tables["Differences"]}["balancer.kind"] == ["coba", "famo", "–"]


def test_the_lowest_of_two_or_more_is_bold_and_only_that(tmp_path, no_figures):
    page = build_report(run_of(tmp_path / "a", {"x": 0.5, "y": 0.7}), run_of(tmp_path / "b", {"x": 0.6}), out=tmp_path / "out")
    assert Tables(page.read_text(encoding="utf-8")).bold == [
        ("Runs", "a"),
        ("Validation loss", "x"),
        ("Validation ratio", "x"),
        ("Validation perplexity", "x"),
    ]


def test_every_run_has_a_section_and_its_figures_beside_the_page(compared):
    html = (compared / "report.html").read_text(encoding="utf-8")
    assert html.count('<details class="run">') == 3 and "No validation after the start" in html
    beside = {file.name for file in compared.glob("*.png")}
    assert {f"{chart.name}.png" for chart in comparison_figures.CHARTS} <= beside
    assert {name for name in beside if "-" in name} == {"coba_scores-01-alpha.png", "balancer_values-01-alpha.png", "balancer_values-02-beta.png"}
    for name in beside:
        with Image.open(compared / name) as image:
            image.load()
    assert html.count("<img ") == len(beside)


def test_a_line_of_every_run_is_in_its_style_and_only_on_the_panels_of_its_tasks(tmp_path):
    found = compared_runs(run_of(tmp_path / "a", {"x": 0.5, "y": 0.7}), run_of(tmp_path / "b", {"y": 0.6}))
    for narrow in (False, True):
        figure = comparison_figures.task_ratios(found, narrow=narrow)
        panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
        curves = {
            task: [line for line in axes.get_lines() if len(line.get_ydata()) == 2 and not np.ptp(line.get_ydata()) == 0]
            for task, axes in panels.items()
        }
        assert {task: [list(line.get_ydata()) for line in lines] for task, lines in curves.items()} == {
            "x": [[1.0, 0.5]],
            "y": [[1.0, 0.7], [1.0, 0.6]],
        }
        assert curves["x"][0].get_color() == curves["y"][0].get_color() != curves["y"][1].get_color()


def test_a_run_that_diverges_does_not_press_the_others_flat(tmp_path):
    found = compared_runs(run_of(tmp_path / "a", {"x": 0.5}), run_of(tmp_path / "b", {"x": 400.0}))
    for draw in (comparison_figures.mean_ratio, comparison_figures.task_ratios):
        low, high = draw(found).axes[0].get_ylim()
        assert low < 0.5 and high < 2
    both = compared_runs(run_of(tmp_path / "c", {"x": 3.0}), run_of(tmp_path / "d", {"x": 4.0}))
    assert comparison_figures.mean_ratio(both).axes[0].get_ylim()[1] > 4


def test_runs_without_anything_to_compare_have_no_figures(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
    assert [chart.draw(compared_runs(*folders)) for chart in comparison_figures.CHARTS] == [None] * 3


def test_a_task_has_the_style_of_its_place_among_all_tasks_of_the_page(tmp_path):
    found = compared_runs(run_of(tmp_path / "a", {"x": 0.5, "y": 0.7}), run_of(tmp_path / "b", {"y": 0.6}))
    (first,), (second,) = (run_figures.validation_ratio(run, order=found.tasks).legends for run in found.runs)
    colours = [{text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)} for legend in (first, second)]
    assert colours[0]["y"] == colours[1]["y"] != colours[0]["x"]
