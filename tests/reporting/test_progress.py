import io
import math
from pathlib import Path

from mftcoder_coba.reporting import Progress, print_final_table


def train(step):
    return {
        "kind": "train",
        "step": step,
        "loss": 1.2344,
        "learning_rate": 5e-6,
        "tokens_per_second": 812.3,
        "tasks": {"completion": {"loss": 1.2, "weight": 0.31}, "comment": {"loss": None, "weight": 0.69}},
    }


def plain(steps, **options) -> list[str]:
    file = io.StringIO()
    with Progress(40, ["completion", "comment"], terminal=False, file=file, **options) as progress:
        progress.write({"kind": "validation", "step": 0, "mean_ratio": 0.93, "tasks": {"completion": {"loss": 1.3, "ratio": 0.93}}})
        for step in steps:
            progress.write(train(step))
        progress.write({"kind": "event", "step": 40, "name": "early_stop", "why": "no [better] step"})
    return file.getvalue().splitlines()


def test_a_log_file_gets_one_line_every_log_every_steps_and_the_first_and_last_step():
    steps = [line.split()[1] for line in plain(range(1, 41), log_every_steps=15) if "tok/s" in line]
    assert steps == ["1/40", "15/40", "30/40", "40/40"]


def test_a_plain_line_tells_loss_rate_speed_time_left_and_each_task():
    ticks = iter(range(100))
    line = plain(range(1, 21), log_every_steps=20, clock=lambda: next(ticks))[2]
    assert line == "step 20/40 | loss 1.234 | lr 5e-06 | 812 tok/s | 0:20 left | completion 1.20 x0.31 ratio 0.93 | comment - x0.69"


def test_validations_and_events_have_lines_of_their_own_without_control_characters():
    lines = plain([])
    assert lines[0] == "step 0/40 | validation: mean ratio 0.930 | completion 1.300 ratio 0.930"
    assert lines[1] == "step 40/40 | early_stop: no [better] step"


def test_an_event_of_every_step_does_not_flood_the_log():
    file = io.StringIO()
    with Progress(40, ["a"], log_every_steps=10, terminal=False, file=file) as progress:
        for step in range(1, 41):
            for task in "ab":
                progress.write({"kind": "event", "step": step, "name": "absent_task", "why": task})
        progress.write({"kind": "event", "step": 35, "name": "best", "why": ""})
    shown = [line.split()[1] for line in file.getvalue().splitlines()]
    assert shown == ["1/40"] * 2 + ["11/40"] * 2 + ["21/40"] * 2 + ["31/40"] * 2 + ["35/40"]


def test_a_terminal_shows_every_task_with_loss_weight_and_ratio():
    file = io.StringIO()
    with Progress(40, ["completion", "comment"], terminal=True, file=file) as progress:
        progress.write({"kind": "validation", "step": 0, "mean_ratio": 0.93, "tasks": {"completion": {"loss": 1.3, "ratio": 0.93}}})
        progress.write(train(7))
    final = file.getvalue()[-600:]
    for part in ("step 7/40", "812 tok/s", "completion", "comment", "1.200", "0.310", "0.690", "0.930"):
        assert part in final


def many(step, tasks, weights) -> dict:
    values = {task: {"loss": 1.0, "weight": weight} for task, weight in zip(tasks, weights, strict=True)}
    return {"kind": "train", "step": step, "loss": 1.0, "tasks": values}


def lines_of(tasks, *records, terminal=False, **options) -> list[str]:
    file = io.StringIO()
    with Progress(40, tasks, terminal=terminal, file=file, **options) as progress:
        for record in records:
            progress.write(record)
    return file.getvalue().splitlines()


def test_one_line_names_eight_of_fifty_tasks_those_with_the_largest_and_smallest_weights():
    tasks = [f"t{number}" for number in range(50)]
    (line,) = lines_of(tasks, many(1, tasks, [number / 1225 for number in range(50)]))
    named = [part.split()[0] for part in line.split(" | ")[4:-1]]
    assert named == ["t0", "t1", "t2", "t3", "t46", "t47", "t48", "t49"] and line.endswith("42 more in between")


def test_tasks_without_a_weight_give_way_to_those_that_have_one():
    tasks = [f"t{number}" for number in range(50)]
    (line,) = lines_of(tasks, many(1, tasks, [0.1 if number in (7, 30, 41) else math.nan for number in range(50)]))
    assert {"t7", "t30", "t41"} <= {part.split()[0] for part in line.split(" | ")[4:]}
    assert line.count(" x-") == 5


def test_a_validation_of_fifty_tasks_is_one_line_with_the_highest_and_lowest_ratios():
    tasks = [f"t{number}" for number in range(50)]
    record = {"kind": "validation", "step": 5, "mean_ratio": 0.5, "tasks": {task: {"loss": 1.0, "ratio": n / 50} for n, task in enumerate(tasks)}}
    (line,) = lines_of(tasks, record)
    assert [part.split()[0] for part in line.split(" | ")[2:-1]] == ["t0", "t1", "t2", "t3", "t46", "t47", "t48", "t49"]


def test_a_long_name_loses_its_middle_in_a_line():
    task = "a" * 60 + "b" * 60
    (line,) = lines_of([task], many(1, [task], [1.0]))
    assert f"{'a' * 18}..{'b' * 20} 1.00 x1.00" in line and len(line) < 120 and line.isascii()


def test_what_is_not_a_number_is_a_dash_and_an_unknown_ratio_is_left_out():
    validation = {"kind": "validation", "step": 0, "mean_ratio": math.nan, "tasks": {"a": {"loss": math.nan, "ratio": math.nan}, "b": {}}}
    lines = lines_of(["a", "b"], validation, {"kind": "train", "step": 1, "loss": math.inf, "tasks": {"a": {"loss": math.nan, "weight": math.nan}}})
    assert lines == ["step 0/40 | validation: mean ratio - | a - ratio - | b - ratio -", "step 1/40 | loss - | lr - | - tok/s | a - x- | b - x-"]


def test_a_file_gets_plain_lines_even_where_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    lines = lines_of(["a"], many(1, ["a"], [1.0]), terminal=None)
    assert lines == ["step 1/40 | loss 1.000 | lr - | - tok/s | a 1.00 x1.00"]


def test_a_terminal_shows_no_more_tasks_than_it_has_rows(monkeypatch):
    monkeypatch.setenv("LINES", "16")
    monkeypatch.setenv("COLUMNS", "80")
    tasks = [f"{'x' * 100}{number:02}" for number in range(50)]
    shown = lines_of(tasks, many(1, tasks, [0.02] * 50), terminal=True)[-14:]
    assert sum(".." in line for line in shown) == 10 and any("40 more in between" in line for line in shown)


def test_the_final_table_in_a_file_is_one_line_per_task_however_long_its_name(make_run):
    tasks = ("short", "x" * 110)
    file = io.StringIO()
    print_final_table(make_run(tasks=tasks, steps=100), {"adapter": Path("/runs") / ("y" * 150), "report": Path("/runs/report.html")}, file)
    lines = [line for line in file.getvalue().splitlines() if line]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(lines) == 6
    assert rows["short"] == ["1.200", "1.067", "0.889", "0.500"]
    assert len(rows["x" * 110]) == 4
    assert rows["adapter"] == [str(Path("/runs") / ("y" * 150))]


def test_the_final_table_of_a_run_without_validation_shows_dashes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "tasks": {"a": {"weight": 1.0}}}\n')
    file = io.StringIO()
    print_final_table(tmp_path, {}, file)
    assert file.getvalue().splitlines()[-1].split() == ["a", "-", "-", "-", "1.000"]
