import io
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
