"""The heat map of gates, and the share of common experts over training."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from mftcoder_coba.reporting import read_run, run_figures
from mftcoder_coba.reporting.figures import style_of
from mftcoder_coba.reporting.gate_figures import SHOWN_TASKS, common_share, expert_gates
from mftcoder_coba.reporting.gates import gates_of
from mftcoder_coba.reporting.layer_grid import Grid
from mftcoder_coba.reporting.report import build_report

CLUSTERS = {"code": ["completion", "comment"], "other": ["unit_test"]}


def run_with(run, *records):
    """The run with other gates, and the tasks of these."""
    tasks = list(dict.fromkeys(task for record in records for task in record["tasks"]))
    metrics = dataclasses.replace(run.metrics, tasks=tasks, gates=[gates_of(record) for record in records])
    return dataclasses.replace(run, metrics=metrics, config={}, best={"step": records[-1]["step"], "criterion": "mean_ratio", "value": 0.5})


@pytest.fixture
def plain(make_run):
    return read_run(make_run(steps=50, balancer="uniform"))


@pytest.fixture
def drawn(plain, make_gates):
    """Draws the heat map of the gates of a step."""

    def draw(clusters=CLUSTERS, step=50, narrow=False, **options):
        return expert_gates(run_with(plain, make_gates(clusters, step, **options)), narrow=narrow)

    return draw


def maps(figure) -> dict[str, np.ndarray]:
    return {axes.get_title(loc="left"): axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()}


def note(figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def test_a_layers_depth_is_the_first_number_of_its_name_and_its_kind_the_rest():
    grid = Grid.of(["layers.3.self_attn.q_proj", "layers.3.mlp.up_proj", "layers.10.self_attn.q_proj", "layers.10.mlp.up_proj"])
    assert (grid.kinds, grid.depths) == (["q_proj", "up_proj"], [3, 10])
    np.testing.assert_array_equal(grid.spread(np.array([[1.0], [2.0], [3.0], [4.0]])), [[[1.0, 3.0], [2.0, 4.0]]])


def test_kinds_that_end_alike_keep_their_whole_names():
    grid = Grid.of(
        ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"]
    )
    assert grid.kinds == ["encoder.block.*.layer.*.SelfAttention.q", "decoder.block.*.layer.*.SelfAttention.q", "k"]


def test_layers_at_one_place_are_shown_by_their_mean_and_a_place_without_a_layer_by_nan():
    grid = Grid.of(["layers.0.mlp.experts.0.up", "layers.0.mlp.experts.1.up", "layers.1.mlp.up", "head"])
    assert (grid.kinds, grid.depths) == (["layers.*.mlp.experts.*.up", "layers.*.mlp.up", "head"], [0, 1])
    found = grid.spread(np.array([[1.0], [3.0], [5.0], [7.0]]))
    np.testing.assert_array_equal(found, [[[2.0, np.nan], [np.nan, 5.0], [7.0, np.nan]]])


def test_each_task_has_a_panel_with_a_band_of_its_experts_and_a_column_of_each_depth(drawn, make_gates):
    figure = drawn()
    found = maps(figure)
    assert list(found) == ["completion (code)", "comment (code)", "unit_test (other)"]
    assert figure.axes[0].yaxis_inverted()  # the first expert is at the top
    values = np.array(make_gates(CLUSTERS, 50)["tasks"]["completion"]["values"])  # [depth and kind, expert]
    shown = found["completion (code)"].reshape(4, 2, 2)  # expert, kind, depth
    np.testing.assert_allclose(np.exp(shown) / 4, values.reshape(2, 2, 4).transpose(2, 1, 0))


def test_an_even_gate_is_white_and_both_directions_are_as_strong(drawn):
    image = drawn(step=0).axes[0].get_images()[0]
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.96
    strong = drawn(step=200).axes[0].get_images()[0]
    assert strong.norm.vmin == -strong.norm.vmax


@pytest.mark.parametrize("step, labels", [(0, ["0.227", "0.238", "0.25", "0.262", "0.275"]), (2000, ["0.0625", "0.125", "0.25", "0.5", "1"])])
def test_the_colour_bar_has_the_gates_values_between_a_least_extent_and_a_gate_of_1(drawn, step, labels):
    bar = drawn(step=step).axes[-1]
    assert [text.get_text() for text in bar.get_xticklabels()] == labels
    assert bar.get_xlabel() == "gate (white: even, 1/4)"


def test_tasks_with_other_numbers_of_experts_are_compared_by_factors_and_all_named(plain, make_gates):
    record = make_gates({"code": ["completion"]}, 50)
    record["tasks"] |= make_gates({"other": ["unit_test"]}, 50, common=1)["tasks"]
    figure = expert_gates(run_with(plain, record))
    assert figure.axes[-1].get_xlabel() == "gate over an even one (white: even)"
    names = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes[:2]]
    assert names == [["common 1", "common 2", "own 1", "own 2"], ["common 1", "own 1", "own 2"]]


def test_the_heat_map_says_which_step_it_is_of_and_what_its_rows_are(drawn):
    assert note(drawn(step=40)) == "Step 40. The rows of an expert, from the top: q_proj, up_proj."


def test_of_fifty_tasks_those_furthest_from_even_are_shown_and_the_others_counted(drawn):
    tasks = [f"task{number}" for number in range(25)]
    figure = drawn({"one": tasks[::-1], "two": [f"{task}b" for task in tasks]})
    # make_gates moves a task by its distance from the second one of its cluster
    furthest = [f"task{number} (one)" for number in range(5, -1, -1)] + [f"task{number}b (two)" for number in range(19, 25)]
    assert list(maps(figure)) == furthest and len(furthest) == SHOWN_TASKS
    assert note(figure).endswith("Not shown: 38 tasks whose gates are closer to even.")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("clusters", [CLUSTERS, {f"{'cluster_' * 12}{c}": [f"{'long_name_' * 11}{c}{i}" for i in range(3)] for c in range(2)}])
def test_nothing_in_the_heat_map_overlaps_or_leaves_the_figure(drawn, clusters, narrow):
    figure = drawn(clusters, depths=80, narrow=narrow)
    figure.draw_without_rendering()
    parts = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()] + [figure._supxlabel.get_window_extent()]
    for part in parts:
        assert part.x0 >= -1 and part.y0 >= -1 and part.x1 <= figure.bbox.x1 + 1 and part.y1 <= figure.bbox.y1 + 1
    assert not any(one.padded(-1).overlaps(other.padded(-1)) for one, other in combinations(parts, 2))


def test_gates_that_are_not_numbers_leave_a_hole(plain, make_gates):
    record = make_gates(CLUSTERS, 50)
    record["tasks"]["comment"]["values"] = [[None] * 4] * 4
    found = maps(expert_gates(run_with(plain, record)))
    assert np.ma.getmaskarray(np.ma.masked_invalid(found["comment (code)"])).all()
    assert np.isfinite(found["completion (code)"]).all()


def test_the_share_of_common_experts_starts_even_and_follows_the_gates(make_run):
    run = read_run(make_run(steps=100, adapter="cgc_lora"))
    axes = common_share(run).axes[0]
    lines = dict(zip(run.tasks, axes.get_lines(), strict=False))
    for number, task in enumerate(run.tasks):
        shares = [float(np.array(gates.values[task])[:, :2].sum(axis=1).mean()) for gates in run.metrics.gates]
        np.testing.assert_array_equal(lines[task].get_xdata(), [0, 50, 100])
        np.testing.assert_allclose(lines[task].get_ydata(), shares)
        assert shares[0] == 0.5 and lines[task].get_color() == style_of(run.tasks, task)[0]
        assert (shares[-1] < 0.45) == (number != 1)


def test_experts_that_are_all_common_make_a_heat_map_alone(plain, make_gates):
    run = run_with(plain, make_gates({"all": ["completion", "comment"]}, 50, common=3, own=0))
    figure = expert_gates(run)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["expert 1", "expert 2", "expert 3"]
    assert list(maps(figure)) == ["completion", "comment"] and common_share(run) is None


def test_without_gates_or_with_a_single_expert_there_is_no_figure(plain, make_gates):
    for run in (plain, run_with(plain, make_gates(CLUSTERS, 50, common=1, own=0))):
        assert expert_gates(run) is None and common_share(run) is None


def test_in_a_report_of_several_runs_those_with_gates_have_their_figures(make_run, tmp_path, monkeypatch):
    charts = tuple(chart for chart in run_figures.CHARTS if chart.name in ("expert_gates", "common_share"))
    monkeypatch.setattr(run_figures, "CHARTS", charts)
    monkeypatch.setattr("mftcoder_coba.reporting.comparison_figures.CHARTS", ())
    page = build_report(make_run("a", steps=10), make_run("b", steps=10, adapter="cgc_lora"), out=tmp_path / "out")
    assert sorted(file.name for file in page.parent.glob("*.png")) == ["common_share-02-b.png", "expert_gates-02-b.png"]
    assert page.read_text().count("Expert gates per task and layer</h") == 1
