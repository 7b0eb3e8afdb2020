import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import read_run, run_figures
from mftcoder_coba.reporting.figures import is_noisy, png, running_mean, style_of
from mftcoder_coba.reporting.report import build_report

PNG = b"\x89PNG\r\n\x1a\n"
LOADING = ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background")
ACTIVE = ("script", "iframe", "object", "embed", "base")


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


def loaded_from_elsewhere(html: str) -> list[str]:
    """What a browser would fetch or run: addresses in attributes and styles other than data, and scripts."""
    page = Page(html)
    addresses = [str(value) for _, attributes in page.tags for name, value in attributes.items() if name in LOADING]
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    in_styles = re.findall(r"url\([^)]*\)|@import", html)
    return [address for address in addresses if not address.startswith("data:")] + handlers + in_styles + [t for t, _ in page.tags if t in ACTIVE]


def test_a_page_is_self_contained_and_needs_no_script(demo, compared):
    for folder, figures in ((demo / "report", len(run_figures.CHARTS)), (compared, 6)):
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert loaded_from_elsewhere(html) == []
        assert sum(tag in ("img", "source") for tag, _ in Page(html).tags) == 2 * figures


@pytest.mark.parametrize(
    "element",
    ['<img src="https://a.b/c.png">', '<img srcset="c.png">', "<script></script>", '<p onclick="x()">', "<style>a{background:url(x)}</style>"],
)
def test_that_check_finds_what_would_be_loaded_or_run(element):
    assert loaded_from_elsewhere(element)


def test_every_figure_is_also_a_png_beside_the_page(demo):
    for chart in run_figures.CHARTS:
        with Image.open(demo / "report" / f"{chart.name}.png") as image:
            image.load()
            assert image.width > 1000


def test_figures_of_an_earlier_report_go_and_other_files_stay(make_run, no_figures):
    folder = make_run(steps=10, balancer="uniform")
    build_report(folder)
    for name in ("coba_scores.png", "weights-03-other.png", "mine.png"):
        (folder / "report" / name).write_bytes(PNG)
    build_report(folder)
    assert sorted(file.name for file in (folder / "report").iterdir()) == ["mine.png", "report.html"]


def test_a_folder_without_a_report_keeps_its_files(make_run, no_figures, tmp_path):
    (tmp_path / "weights.png").write_bytes(PNG)
    build_report(make_run(steps=10), out=tmp_path)
    assert (tmp_path / "weights.png").exists() and (tmp_path / "report.html").exists()


def test_what_comes_from_files_is_escaped(make_run, make_accounting, no_figures):
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
def test_a_missing_file_is_left_out(make_run, missing, no_figures):
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
    run = read_run(make_run(steps=steps, adapter="cgc_lora"))
    for chart in run_figures.CHARTS:
        chart.draw(run).draw_without_rendering()


def test_a_run_cut_mid_line_has_a_page(make_run, no_figures):
    folder = make_run(steps=60)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    assert "completion" in page_of(folder).text


def test_the_accounting_has_a_row_per_task_and_split(make_run, no_figures):
    folder = make_run(steps=10)
    text = page_of(folder).text
    assert "completion train" in text and "comment valid" in text and "887,001" in text
    assert "99.57 % full; 54.40 steps of 64 rows" in text and "20-23" in text


def test_ten_tasks_can_be_told_apart_and_keep_their_style_in_all_figures(make_run):
    tasks = [f"task{number}" for number in range(10)]
    styles = [style_of(tasks, task) for task in tasks]
    assert len(set(styles)) == 10
    run = read_run(make_run(tasks=tuple(tasks), steps=120))
    for draw in (run_figures.validation_ratio, run_figures.weights, run_figures.coba_scores, run_figures.balancer_values, run_figures.train_loss):
        (legend,) = draw(run).legends
        entries = dict(
            zip((text.get_text() for text in legend.texts), (to_hex(line.get_color()).upper() for line in legend.get_lines()), strict=True)
        )
        assert [entries[task] for task in tasks] == [colour for colour, _ in styles]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_legend_of_many_long_names_stays_inside_the_figure_and_off_the_axes(make_run, narrow):
    tasks = tuple(f"{'long_name_' * 11}{number}" for number in range(10))
    figure = run_figures.validation_ratio(read_run(make_run(tasks=tasks, steps=60)), narrow=narrow)
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


def test_random_weights_are_noisy_and_those_that_move_slowly_are_not():
    random = np.random.default_rng(0)
    assert is_noisy(random.random(200)) and not is_noisy(np.cos(np.arange(200) / 40)) and not is_noisy(np.full(200, 0.5))
    assert not is_noisy(random.random(5))


def labels(figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def test_whatever_a_balancer_records_has_a_panel_of_its_name(make_run):
    figure = run_figures.balancer_values(read_run(make_run(steps=30, balancer="famo")))
    assert labels(figure) == ["logit", "a new value"]
    for number, line in enumerate(figure.axes[0].get_lines()[:3]):
        np.testing.assert_allclose(line.get_ydata(), 0.01 * number * np.arange(1, 31))
    assert labels(run_figures.balancer_values(read_run(make_run("other", steps=30)))) == ["ratio", "slope", "largest slope"]


def test_a_balancer_that_only_has_weights_makes_no_figure_of_values(make_run):
    assert run_figures.balancer_values(read_run(make_run(steps=30, balancer="uniform"))) is None


def test_the_ratios_of_training_losses_do_not_stand_among_those_of_validation_losses(make_run):
    """`ratio` in a balancer's record may be of any losses; `valid_loss` is what the validation mini-batches gave."""
    folder = make_run(steps=60)
    before = len(run_figures.validation_ratio(read_run(folder)).axes[0].get_lines())
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"valid_loss"', '"something_else"'))
    assert len(run_figures.validation_ratio(read_run(folder)).axes[0].get_lines()) == before - 3


def test_a_png_has_the_pixels_that_matplotlib_saves(make_run):
    run, expected = read_run(make_run(steps=30, balancer="uniform")), io.BytesIO()
    run_figures.weights(run).savefig(expected, format="png")
    with Image.open(io.BytesIO(png(run_figures.weights(run)))) as ours, Image.open(expected) as theirs:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_accounting_of_another_kind_is_named(make_run, no_figures):
    folder = make_run(steps=10)
    (folder / "accounting.json").write_text('{"tasks": {"a": {"train": {}}}}')
    with pytest.raises(UserError, match="accounting") as error:
        build_report(folder)
    assert error.value.where == str(folder / "accounting.json")
