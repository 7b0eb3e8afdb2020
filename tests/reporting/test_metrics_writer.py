import contextlib
import json
import math
import resource
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import MetricsWriter
from mftcoder_coba.reporting.charts import scalars


def train(step: int, **more) -> dict:
    return {"kind": "train", "step": step, "loss": 2.0, "tasks": {"a": {"loss": 1.5, "tokens": 7, "weight": 0.25}}, **more}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder: Path, steps: range, resume_step: int | None = None, tensorboard: bool = False) -> None:
    with MetricsWriter(folder, tensorboard, None, resume_step) as writer:
        for step in steps:
            writer.write(train(step))


@contextlib.contextmanager
def room(size: int):
    """Lets no file grow beyond so many bytes: writing is refused as on a full disk, after the part that fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=None, resume_step=None)
    writer.write(train(1))
    assert lines(tmp_path) == [train(1)]
    writer.close()


def test_nan_and_infinity_are_written_as_null(tmp_path):
    with MetricsWriter(tmp_path, False, None, None) as writer:
        writer.write({"kind": "train", "step": 1, "loss": math.nan, "tasks": {"a": {"loss": math.inf}}})
    (record,) = lines(tmp_path)
    assert record["loss"] is None and record["tasks"]["a"]["loss"] is None


def test_a_resumed_run_has_each_step_once_and_keeps_the_bytes_before(tmp_path):
    write(tmp_path, range(1, 9))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:5]
    write(tmp_path, range(6, 11), resume_step=5)
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, 11))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:5] == before


def validation(step: int) -> dict:
    return {"kind": "validation", "step": step, "loss": 2.0, "mean_ratio": 1.0, "tasks": {}}


def event(step: int, name: str) -> dict:
    return {"kind": "event", "step": step, "name": name, "why": ""}


@pytest.mark.parametrize("pending", [False, True])
def test_a_validation_that_the_resumed_run_does_again_is_cut_with_all_after_it(tmp_path, pending):
    of_step_2 = [event(2, "absent_task"), train(2), validation(2), event(2, "best")]
    with MetricsWriter(tmp_path, False, None, None) as writer:
        for record in [validation(0), train(1), validation(1), *of_step_2, train(3), validation(3)]:
            writer.write(record)
    MetricsWriter(tmp_path, False, None, resume_step=2, pending=pending).close()
    assert lines(tmp_path) == [validation(0), train(1), validation(1), *(of_step_2[:2] if pending else of_step_2)]


def test_cutting_needs_no_room(tmp_path):
    write(tmp_path, range(1, 9))
    with room(0):
        MetricsWriter(tmp_path, False, None, resume_step=5).close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_finds_no_room_leaves_no_part_and_is_written_in_order_when_there_is_some(tmp_path, capsys):
    records = [train(step) for step in range(1, 5)]
    size = len(json.dumps(records[0])) + 1
    for fits in range(size):  # bytes of the second record
        folder = tmp_path / str(fits)
        with MetricsWriter(folder, False, None, None) as writer:
            writer.write(records[0])
            with room(size + fits):
                writer.write(records[1])
                writer.write(records[2])
            assert (folder / "metrics.jsonl").read_text() == json.dumps(records[0]) + "\n"
            writer.write(records[3])
            assert lines(folder) == records
        warnings = capsys.readouterr().err
        assert warnings.count("warning: ") == 1 and str(folder / "metrics.jsonl") in warnings and "wait in memory" in warnings


@pytest.mark.parametrize("end", ["flush", "close"])
def test_flush_and_close_write_what_waits(tmp_path, end):
    writer = MetricsWriter(tmp_path, False, None, None)
    with room(10):
        writer.write(train(1))
    getattr(writer, end)()
    assert lines(tmp_path) == [train(1)]
    writer.close()


def test_what_never_finds_room_is_counted_at_the_end(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, False, None, None)
    writer.write(train(1))
    with room(1):
        for step in (2, 3, 4):
            writer.write(train(step))
        writer.close()
    assert "no room for the last 3 records; they are lost" in capsys.readouterr().err
    assert lines(tmp_path) == [train(1)]


def test_tensorboard_misses_nothing_on_a_disk_that_was_full_for_a_while(tmp_path):
    with MetricsWriter(tmp_path, True, None, None) as writer:
        for step in range(1, 60):
            with room(700) if 20 <= step < 40 else contextlib.nullcontext():
                writer.write(train(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("weight/a")] == list(range(1, 60))


def test_another_sink_that_cannot_be_written_warns_once_and_ends_nothing(tmp_path, capsys):
    class ClosedPipe:
        def write(self, record):
            raise BrokenPipeError(32, "Broken pipe")

        def close(self):
            raise BrokenPipeError(32, "Broken pipe")

    with MetricsWriter(tmp_path, False, None, None, also=[ClosedPipe()]) as writer:
        writer.write(train(1))
        writer.write(train(2))
    assert lines(tmp_path) == [train(1), train(2)]
    assert capsys.readouterr().err.count("Broken pipe") == 1


def test_a_folder_that_cannot_be_written_at_the_start_is_a_users_mistake(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        MetricsWriter(tmp_path, True, None, None)
    assert error.value.where == str(tmp_path / "tensorboard")


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_dropped_on_resume(tmp_path, cut):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    write(tmp_path, range(4, 6), resume_step=3)
    # Without its line end alone (cut 1) the third record is whole.
    assert [record["step"] for record in lines(tmp_path)] == ([1, 2, 3, 4, 5] if cut == 1 else [1, 2, 4, 5])


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_cut(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    broken = path.read_bytes().replace(b'{"kind": "train", "step": 2', b"oops", 1)
    path.write_bytes(broken)
    with pytest.raises(UserError) as error:
        MetricsWriter(tmp_path, False, None, resume_step=1)
    assert error.value.where == f"{path}:2"
    assert path.read_bytes() == broken


def test_a_run_that_starts_anew_sets_the_old_metrics_aside(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3))
    assert len(lines(tmp_path)) == 2
    assert len((tmp_path / "metrics.jsonl.old").read_text().splitlines()) == 3


def test_an_unknown_kind_is_refused(tmp_path):
    with MetricsWriter(tmp_path, False, None, None) as writer, pytest.raises(ValueError, match="trian"):
        writer.write({"kind": "trian", "step": 1})


def test_wandb_without_its_package_is_a_users_mistake_and_touches_nothing(tmp_path, monkeypatch):
    write(tmp_path, range(1, 4))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        MetricsWriter(tmp_path, False, "project", None)
    assert len(lines(tmp_path)) == 3 and not (tmp_path / "wandb_id.txt").exists()


def test_every_sink_gets_every_record(tmp_path):
    seen = []

    class Listener:
        def write(self, record):
            seen.append(record["step"])

        def close(self):
            seen.append("closed")

    with MetricsWriter(tmp_path, False, None, None, also=[Listener()]) as writer:
        writer.write(train(1))
        writer.write({"kind": "event", "step": 2, "name": "best", "why": "lowest"})
    assert seen == [1, 2, "closed"]


def test_scalars_are_grouped_by_what_they_are_and_then_by_task():
    assert scalars(train(3, learning_rate=1e-5)) == {
        "train/loss": 2.0,
        "train/learning_rate": 1e-5,
        "train_loss/a": 1.5,
        "train_tokens/a": 7.0,
        "weight/a": 0.25,
    }
    balancer = {"rcs": 0.5, "acs": 0.25, "valid_loss": 1.0, "ratio": 0.5, "slope": -0.125, "weight": 0.5, "slot": 3}
    assert scalars({"kind": "balancer", "step": 3, "df": 0.75, "alpha_max": None, "tasks": {"a": balancer}}) == {
        "balancer/df": 0.75,
        "balancer_rcs/a": 0.5,
        "balancer_acs/a": 0.25,
        "balancer_valid_loss/a": 1.0,
        "balancer_ratio/a": 0.5,
        "balancer_slope/a": -0.125,
    }
    validation = {
        "kind": "validation",
        "step": 3,
        "mean_ratio": 0.5,
        "loss": 1.0,
        "tasks": {"a": {"loss": 1.0, "ratio": math.nan, "perplexity": 2.5, "tokens": 9}},
    }
    assert scalars(validation) == {"valid/mean_ratio": 0.5, "valid/loss": 1.0, "valid_loss/a": 1.0, "valid_perplexity/a": 2.5}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write(tmp_path, range(1, 9), tensorboard=True)
    write(tmp_path, range(6, 11), resume_step=5, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("weight/a")] == list(range(1, 11))


def test_the_charts_of_an_event_file_are_as_documented(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True, wandb=None, resume_step=None) as writer:
        writer.write(train(1, learning_rate=1e-5, grad_norm=math.nan))
        famo = {"valid_loss": 1.0, "slot": 3, "weight": 0.5, "logit": 0.25, "loss": 4.0}
        writer.write({"kind": "balancer", "step": 1, "seconds": 0.5, "df": 0.75, "tasks": {"a": famo}})
        values = {"loss": 2.0, "ratio": 0.5, "perplexity": 2.5, "tokens": 9}
        writer.write({"kind": "validation", "step": 1, "loss": 2.0, "mean_ratio": 0.5, "tasks": {"a": values, "b.c-d_e": values}})
        writer.write({"kind": "event", "step": 1, "name": "best", "why": "lowest"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    by_task = ["train_loss", "train_tokens", "weight", "balancer_valid_loss", "balancer_logit", "balancer_loss"]
    of_validation = [f"valid_{name}/{task}" for name in ("loss", "ratio", "perplexity") for task in ("a", "b.c-d_e")]
    of_run = ["train/loss", "train/learning_rate", "balancer/seconds", "balancer/df", "valid/loss", "valid/mean_ratio"]
    assert sorted(tags["scalars"]) == sorted([*(f"{name}/a" for name in by_task), *of_validation, *of_run])
    assert [event.value for event in events.Scalars("balancer_loss/a")] == [4.0]
    assert [event.value for event in events.Scalars("balancer_valid_loss/a")] == [1.0]
    assert tags["tensors"] == ["event/best/text_summary"]
