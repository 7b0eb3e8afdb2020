"""Replays of recordings: the worked case of the design as a CSV, what held back means, what comes out, and mistakes."""

import csv
import math

import numpy as np
import pytest

from mftcoder_coba.errors import UserError
from mftcoder_coba.replaying import Span, held_back, read_recording, replay, replay_variant, variants

WORKED = ("window=200", "warmup=100")
LBTW = '{"kind": "lbtw", "signal": "validation"}'


def worked_losses(step):
    """Task A converges, B overfits after step 300, C converges slowly."""
    return (
        0.5 + 0.5 * math.exp(-step / 400),
        0.4 + 0.6 * math.exp(-step / 120) + 0.0004 * max(0, step - 300),
        0.3 + 0.7 * math.exp(-step / 900),
    )


@pytest.fixture
def worked(tmp_path):
    """The worked case as a CSV of 500 observations."""
    return write(tmp_path / "worked.csv", [["step", "A", "B", "C"]] + [[step, *map(repr, worked_losses(step))] for step in range(501)])


def write(path, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")
    return path


def replayed(path, balancers=("coba",), settings=(), sweeps=(), coverage=None):
    recording = read_recording(path)
    return [replay_variant(recording, variant, coverage) for variant in variants(recording, balancers, settings, sweeps)]


def written(folder):
    with (folder / "weights.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_worked_case_of_the_design_comes_out_to_three_digits(worked):
    (result,) = replayed(worked, settings=WORKED)
    assert np.round(result.weights[250 - 1], 3).tolist() == [0.361, 0.210, 0.429]
    assert np.round(result.weights[500 - 1], 3).tolist() == [0.419, 0.108, 0.473]
    assert (result.weights[:99] == 1 / 3).all()  # the warm-up


def test_the_file_of_weights_holds_every_bit(worked, tmp_path):
    replay(worked, ["coba"], WORKED, out=tmp_path / "out")
    (result,) = replayed(worked, settings=WORKED)
    rows = written(tmp_path / "out")
    assert [int(row["step"]) for row in rows] == list(range(1, 501))
    assert np.array([[float(row[task]) for task in "ABC"] for row in rows]).tobytes() == result.weights.tobytes()


def test_it_says_who_was_held_back_when(worked):
    told = replay(worked, ["coba"], WORKED)
    (result,) = replayed(worked, settings=WORKED)
    low = result.steps[result.weights[:, 1] < 0.9 / 3]
    worst = result.weights[:, 1].argmin()
    sentence = f"  B: held back in steps {low[0]}-{low[-1]} (lowest {result.weights[worst, 1]:.2g} at {result.steps[worst]})"
    assert f"{sentence}; {len(low)} of 500 observations" in told
    assert low[0] == 100  # the first weights after the warm-up
    assert "  C: never held back" in told


def test_without_a_folder_the_files_of_a_csv_come_beside_it(worked):
    replay(worked, ["coba"], WORKED)
    assert sorted(file.name for file in (worked.parent / "worked-replay").iterdir()) == ["weights.csv", "weights.png"]


def test_a_sweep_gives_one_replay_for_each_combination_as_if_asked_for_singly(worked):
    swept = replayed(worked, settings=WORKED[1:], sweeps=["tau=1,5", "window=100,200"])
    assert [result.variant.label.split() for result in swept] == [
        ["coba", "tau=1", "window=100", "warmup=100"],
        ["coba", "tau=1", "window=200", "warmup=100"],
        ["coba", "tau=5", "window=100", "warmup=100"],
        ["coba", "tau=5", "window=200", "warmup=100"],
    ]
    for result, settings in zip(swept, (("tau=1", "window=100"), ("tau=1", "window=200"), ("window=100",), ("window=200",)), strict=True):
        (single,) = replayed(worked, settings=("warmup=100", *settings))
        assert single.weights.tobytes() == result.weights.tobytes()
    assert len({result.weights.tobytes() for result in swept}) == 4


def test_a_sweep_of_lists_and_of_words(worked):
    labels = [result.variant.label for result in replayed(worked, settings=WORKED, sweeps=['scores=["rcs"],["rcs","acs"]', "df_history=warmup,all"])]
    assert labels == [
        f"coba window=200 warmup=100 df_history={history} scores={scores}" for scores in ('["rcs"]', '["rcs","acs"]') for history in ("warmup", "all")
    ]


def test_a_setting_goes_to_the_balancers_that_have_it(worked):
    results = replayed(worked, balancers=["uniform", "coba"], settings=WORKED, sweeps=["tau=2,5"])
    assert [result.variant.config.kind for result in results] == ["uniform", "coba", "coba"]
    assert (results[0].weights == 1 / 3).all()


def test_an_update_interval_takes_only_its_steps(worked, tmp_path):
    (every_tenth,) = replayed(worked, settings=("window=20", "warmup=10", "update_interval=10"))
    rows = [["step", "A", "B", "C"]] + [[step, *map(repr, worked_losses(step))] for step in range(0, 501, 10)]
    (alone,) = replayed(write(tmp_path / "tenth.csv", rows), settings=("window=20", "warmup=10"))
    assert every_tenth.observed == 50
    assert every_tenth.weights[9::10].tobytes() == alone.weights.tobytes()


def test_starred_lbtw_follows_its_formula(worked):
    (result,) = replayed(worked, balancers=[LBTW])
    ratios = np.array([worked_losses(step) for step in range(1, 501)]) / np.array(worked_losses(0))
    expected = np.sqrt(ratios) / np.sqrt(ratios).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.weights, expected, rtol=1e-12)


def test_slots_of_a_csv_make_paired_slopes_possible_and_tell_the_coverage(tmp_path):
    rows = [["step", "A", "A.slot", "B", "B.slot"], [0, 1.0, "", 1.0, ""]]
    # Slot 1 is harder by 0.5 for both tasks; A falls by .01 a step, B rises by .01: plain slopes would see the slots.
    rows += [[step, 1 - 0.01 * step + 0.5 * (step % 2), step % 2, 1 + 0.01 * step + 0.5 * (step % 2), step % 2] for step in range(1, 13)]
    path = write(tmp_path / "slots.csv", rows)
    (paired,) = replayed(path, balancers=['{"kind": "coba", "slope": "paired"}'])
    assert (paired.config.window, paired.config.warmup) == (4, 2)
    # The slopes are 0, 0, then -.01 and .01. So RCS = softmax(-1, 1), ACS = softmax(1, -1), and in DF's eleven arguments stand one 0 and ten -5.5.
    relative = np.exp([-1, 1]) / np.exp([-1, 1]).sum()
    factor = 11 * math.exp(-5.5) / (10 * math.exp(-5.5) + 1)
    np.testing.assert_allclose(paired.weights[-1], factor * relative + (1 - factor) * relative[::-1], rtol=1e-9)


def test_missing_losses_may_be_empty_null_or_nan(tmp_path):
    rows = [["step", "A", "B"], [0, 1.0, 1.0], [1, "", 0.9], [2, "null", 0.8], [3, "nan", 0.7], [4, 0.9, "inf"]]
    recording = read_recording(write(tmp_path / "missing.csv", rows))
    assert np.isnan(recording.losses).tolist() == [[True, False], [True, False], [True, False], [False, True]]
    assert recording.slots is None and recording.coverage is None


def test_coverage_gives_window_and_warmup(worked):
    (result,) = replayed(worked, coverage=100)
    (set_by_hand,) = replayed(worked, settings=WORKED)
    assert result.weights.tobytes() == set_by_hand.weights.tobytes()


def test_held_back_spans_are_merged_over_short_gaps_and_kept_apart_by_long_ones():
    steps = np.arange(10, 410, 10)  # 40 observations
    weights = np.full(40, 0.5)  # of 2 tasks: 1/K, and held back below 0.45
    weights[[3, 4]] = 0.4, 0.3
    weights[7] = 0.44  # two observations between: still the same span
    weights[11] = 0.2  # three between: another
    weights[30] = 0.46  # within the margin
    spans = held_back(steps, weights, tasks=2)
    assert spans == [Span(40, 80, 3, 0.3, 50), Span(120, 120, 1, 0.2, 120)]


def test_nothing_is_held_back_at_even_weights():
    assert held_back(np.arange(1, 5), np.full(4, 1 / 3), tasks=3) == []


def test_a_warmup_that_never_ends_is_told(worked):
    told = "\n".join(replay(worked, ["coba"], ["window=200", "warmup=501"]))
    assert "the warm-up takes 501 observations and there are 500" in told


@pytest.mark.parametrize("count", [1, 5, 12, 13])
def test_there_is_a_figure_for_every_twelve_replays(worked, count):
    replay(worked, ["coba"], WORKED, sweeps=["tau=" + ",".join(str(value) for value in range(1, count + 1))])
    figures = sorted(file.name for file in (worked.parent / "worked-replay").glob("*.png"))
    assert figures == (["weights-2.png", "weights.png"] if count > 12 else ["weights.png"])


@pytest.mark.parametrize(
    ("rows", "place", "words"),
    [
        ([["iteration", "A"], [0, 1.0], [1, 1.0]], ":1", 'the first column is "iteration"'),
        ([["step", "A", "A"], [0, 1.0, 1.0]], ":1", "two columns have the name A"),
        ([["step"], [0], [1]], ":1", "names no task"),
        ([["step", "A", "B.slot"], [0, 1.0, 0]], ":1", "B.slot is of no task"),
        ([["step", "a task"], [0, 1.0]], ":1", '"a task" cannot be the name'),
        ([["step", "A"], [1, 1.0], [2, 1.0]], ":2", "of step 1, not of step 0"),
        ([["step", "A"], [0, 1.0], [2, 1.0], [2, 1.0]], ":4", "step 2 comes after step 2"),
        ([["step", "A"], [0, 1.0], ["two", 1.0]], ":3", 'the step is "two"'),
        ([["step", "A"], [0, 1.0], [1, "low"]], ":3", 'A is "low", not a number'),
        ([["step", "A"], [0, 1.0], [1]], ":3", "has 1 values; the first line names 2"),
        ([["step", "A", "A.slot"], [0, 1.0, ""], [1, 1.0, -1]], ":3", 'A.slot is "-1"'),
        ([["step", "A"], [0, 1.0]], "", "no observation after the line of step 0"),
        ([[]], "", "is empty"),
    ],
)
def test_a_mistake_in_a_csv_is_told_with_its_line(tmp_path, rows, place, words):
    path = write(tmp_path / "losses.csv", rows)
    with pytest.raises(UserError) as error:
        read_recording(path)
    assert words in error.value.what and error.value.where == f"{path}{place}"


@pytest.mark.parametrize(
    ("balancers", "settings", "sweeps", "words"),
    [
        (["cobra"], [], [], 'balancer.kind is "cobra": did you mean "coba"?'),
        (["coba"], ["tauu=2"], [], 'no balancer here has the key tauu: did you mean "tau"?'),
        (["coba"], [], ["wndow=2,4"], 'no balancer here has the key wndow: did you mean "window"?'),
        (["coba"], ["tau=-1"], [], "balancer.tau is -1"),
        (["coba"], [], ["tau=1,two"], 'balancer.tau is "two"'),
        (["coba"], ["tau"], [], "must have the form KEY=VALUE"),
        (["coba"], ["kind=uniform"], [], "the method is not a setting"),
        (['{"kind": "coba", "tauu": 1}'], [], [], 'unknown key balancer.tauu: did you mean "tau"?'),
        (['{"kind": '], [], [], "is not JSON"),
        (['{"kind": "fixed", "weights": {"A": 1}}'], [], [], "missing: ['B', 'C']"),
        ([], [], [], "the recording names no balancer"),
        (["coba"], [], ["tau=" + ",".join(map(str, range(1, 50)))], "these are 49 replays"),
    ],
)
def test_a_mistake_in_balancers_and_settings_is_told(worked, balancers, settings, sweeps, words):
    with pytest.raises(UserError) as error:
        variants(read_recording(worked), balancers, settings, sweeps)
    assert words in error.value.what


def test_a_coba_whose_window_nothing_tells_asks_for_it(worked):
    with pytest.raises(UserError, match="window and warmup of coba follow from the number of mini-batches") as error:
        replayed(worked)
    assert "--coverage" in error.value.fix


def test_a_folder_that_cannot_be_written_is_told(worked):
    with pytest.raises(UserError, match="cannot be written") as error:
        replay(worked, ["uniform"], out=worked / "inside_a_file")
    assert "--out" in error.value.fix


def test_paired_slopes_without_slots_are_refused(worked):
    with pytest.raises(UserError, match="does not hold every slot"):
        replayed(worked, settings=(*WORKED, "slope=paired"))


@pytest.mark.parametrize(
    ("balancer", "signal", "fix"),
    [
        ("dwa", "train_losses", "compare"),
        ("famo", "train_losses_after", "compare"),
        ('{"kind": "famo", "signal": "validation"}', "validation_losses_before", "compare"),
        ("lbtw", "train_losses", LBTW),
        ("uncertainty", "train_losses", "compare"),
        ("random", "are drawn", "compare"),
        ("proportional", "numbers of supervised tokens", "compare"),
    ],
)
def test_a_method_that_looks_at_more_than_validation_losses_is_refused(worked, balancer, signal, fix):
    with pytest.raises(UserError) as error:
        replayed(worked, balancers=[balancer])
    assert signal in error.value.what and fix in error.value.fix
