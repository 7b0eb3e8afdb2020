"""What the figures draw."""

import numpy as np
import pytest

from mftcoder_coba.comparing import Outcome
from mftcoder_coba.comparing.curves import curves_of, normalised
from mftcoder_coba.comparing.figures import charts_of, draw, mean_ratio
from mftcoder_coba.reporting import read_run


@pytest.fixture
def outcomes(make_run):
    def of(name, method, seed, task, *arguments, **more):
        return Outcome(method, seed, task, read_run(make_run(name, *arguments, **more)))

    return [
        of("u1", "uniform", 1, None, {"a": [1, 0.6, 0.5], "b": [1, 0.4, 0.8]}, 10),
        of("u2", "uniform", 2, None, {"a": [1, 0.8, 0.7], "b": [1, 0.6, 0.8]}, 20),
        of("sa", "STL", 1, "a", {"a": [1, 0.5, 0.3]}, 8, every=4),
        of("sb", "STL", 1, "b", {"b": [1, 0.2, 0.3]}, 1, every=1),
    ]


def test_a_normalised_curve_runs_from_its_least_to_its_largest():
    assert normalised(np.array([1.0, 0.6, 0.8])).tolist() == pytest.approx([1, 0, 0.5])
    assert normalised(np.array([0.7, 0.7])).tolist() == [0, 0]


def test_a_curve_is_the_mean_over_seeds(outcomes):
    uniform, _ = curves_of(outcomes, ["a", "b"])
    steps, ratio = uniform.ratio["a"]
    assert steps.tolist() == [0, 10, 20] and ratio.tolist() == pytest.approx([1, 0.7, 0.6])
    assert uniform.mean_ratio[1].tolist() == pytest.approx([1, (0.5 + 0.7) / 2, (0.65 + 0.75) / 2])
    assert uniform.selected == [10, 20]
    assert uniform.weights["a"][1].tolist() == [0.5] * 20


def test_a_single_task_is_drawn_over_the_steps_of_the_mixture(outcomes):
    _, single = curves_of(outcomes, ["a", "b"])
    # Their runs end at steps 8 and 2, where the mixture is at 20.
    assert [single.ratio[task][0].tolist() for task in ("a", "b")] == [[0, 10, 20], [0, 10, 20]]
    assert single.mean_ratio is None and single.weights == {}
    assert single.best == pytest.approx((0.3 + 0.2) / 2)


def test_there_is_a_file_for_each_figure_that_has_something_to_show(outcomes, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "coba_scores-old.png").write_bytes(b"of an earlier call")
    drawn = draw(charts_of(outcomes, ["a", "b"]), folder)
    assert [item["chart"].name for item in drawn] == ["normalised_ratio", "mean_ratio", "weights"]
    assert {path.name for path in folder.iterdir()} == {"normalised_ratio.png", "mean_ratio.png", "weights.png"}
    assert draw(charts_of([], ["a", "b"]), folder) == []


def test_each_method_with_a_model_per_task_has_a_level_line_of_its_own(outcomes, make_run):
    others = [
        Outcome("lora-each", 1, task, read_run(make_run(f"lora-{task}", {task: [1, 0.7, ratio]}, 20))) for task, ratio in (("a", 0.5), ("b", 0.6))
    ]
    figure = mean_ratio(curves_of([*outcomes, *others], ["a", "b"]), 20, narrow=False)
    levels = {line.get_ydata()[0]: line.get_color() for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1}
    assert list(levels) == pytest.approx([0.25, 0.55]) and len(set(levels.values())) == 2
    (legend,) = figure.legends
    shown = dict(zip((text.get_text() for text in legend.get_texts()), legend.get_lines(), strict=True))
    assert [shown[name].get_color() for name in ("STL", "lora-each")] == list(levels.values())
    assert shown["STL"].is_dashed() and not shown["uniform"].is_dashed()
