import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mftcoder_coba.reporting import read_run
from mftcoder_coba.reporting.figures import CHARTS, coba_scores, running_mean, style_of, train_loss, validation_ratio, weights
from mftcoder_coba.reporting.report import build_report

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects tags with their attributes, and the text outside of style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._inside = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        self._inside.append("/" + tag)

    def handle_data(self, data):
        if self._inside[-1:] != ["style"]:
            self.text += data


def page_of(folder) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def test_the_page_is_self_contained_and_needs_no_script(make_run):
    page = page_of(make_run(steps=120))
    assert not {"script", "iframe"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset", "href")]
    assert len(addresses) == 2 * len(CHARTS) + 1
    assert all(address.startswith("data:") for address in addresses)


def test_every_figure_is_also_a_png_beside_the_page(make_run):
    folder = make_run(steps=120)
    build_report(folder)
    for chart in CHARTS:
        assert (folder / "report" / f"{chart.name}.png").read_bytes().startswith(PNG)


def test_a_run_without_coba_has_no_scores_and_loses_those_of_an_earlier_report(make_run):
    folder = make_run(steps=60, balancer="uniform")
    (folder / "report").mkdir()
    (folder / "report" / "coba_scores.png").write_bytes(PNG)
    assert "CoBa scores" not in page_of(folder).text
    assert not (folder / "report" / "coba_scores.png").exists()


def test_what_comes_from_files_is_escaped(make_run, make_accounting):
    folder = make_run(steps=10)
    evil = "<script>alert(1)</script>"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 10, "name": evil, "why": evil}) + "\n")
    (folder / "environment.json").write_text(json.dumps({evil: {evil: {evil: evil}}}))
    (folder / "accounting.json").write_text(json.dumps(make_accounting((evil,))))
    config = json.loads((folder / "config.json").read_text())
    config["run"]["name"] = config["model"]["path"] = evil
    (folder / "config.json").write_text(json.dumps(config))
    page = page_of(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8


@pytest.mark.parametrize("missing", ["config", "environment", "accounting", "best"])
def test_a_missing_file_is_left_out(make_run, missing):
    folder = make_run(steps=60)
    (folder / f"{missing}.json").unlink()
    text = page_of(folder).text
    heading = {"config": "Config", "environment": "Environment", "accounting": "The first epoch", "best": "The best step by"}[missing]
    assert heading not in text and "completion" in text


def test_a_run_killed_before_its_first_step_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = page_of(tmp_path)
    assert "No validation after the start" in page.text and "img" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps_has_all_figures(make_run, steps):
    assert sum(tag == "img" for tag, _ in page_of(make_run(steps=steps)).tags) == len(CHARTS)


def test_a_run_cut_mid_line_has_a_page(make_run):
    folder = make_run(steps=60)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    assert "completion" in page_of(folder).text


def test_the_accounting_has_a_row_per_task_and_split(make_run):
    folder = make_run(steps=10)
    text = page_of(folder).text
    assert "completion train" in text and "comment valid" in text and "887,001" in text
    assert "99.57 % full; 54.40 steps of 64 rows" in text and "20-23" in text


def test_ten_tasks_can_be_told_apart_and_keep_their_style_in_all_figures(make_run):
    tasks = [f"task{number}" for number in range(10)]
    styles = [style_of(tasks, task) for task in tasks]
    assert len(set(styles)) == 10
    run = read_run(make_run(tasks=tuple(tasks), steps=120))
    for draw in (validation_ratio, weights, coba_scores, train_loss):
        (legend,) = draw(run).legends
        entries = dict(
            zip((text.get_text() for text in legend.texts), (to_hex(line.get_color()).upper() for line in legend.get_lines()), strict=True)
        )
        assert [entries[task] for task in tasks] == [colour for colour, _ in styles]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_legend_of_many_long_names_stays_inside_the_figure_and_off_the_axes(make_run, narrow):
    tasks = tuple(f"{'long_name_' * 11}{number}" for number in range(10))
    figure = validation_ratio(read_run(make_run(tasks=tasks, steps=60)), narrow=narrow)
    figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and legend.y0 >= figure.bbox.y0
    assert legend.y1 <= axes.y0 + 1
    assert figure.axes[0].get_window_extent().height > 1.5 * figure.dpi


def test_the_running_mean_keeps_constants_and_straight_lines():
    np.testing.assert_allclose(running_mean(np.full(500, 3.0)), 3.0)
    line = np.arange(500.0)
    np.testing.assert_allclose(running_mean(line)[10:-10], line[10:-10])
    np.testing.assert_array_equal(running_mean(np.array([1.0, 5.0])), [1.0, 5.0])
