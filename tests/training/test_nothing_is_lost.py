"""Killed, interrupted, damaged, moved to other ranks: a run goes on as if nothing had happened, or says why not."""

import json
import shutil
import signal
import time

import pytest
from killing import differences, forget_after, kill_when, last_checkpoint, lines_of, records, states
from ranks import started_command
from toy import TASKS

LORA = 'adapter={"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.1}'
EXPERTS = 'adapter={"kind": "cgc_lora", "clusters": {"one": ["count"], "two": ["reverse", "upper"]}, "rank": 6, "dropout": 0.1}'
NO_DROPOUT = 'adapter={"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.0}'


# The moment of a kill is then never behind the end, on a machine that is busy with other things.
LONGER = ("training.max_steps=20", "validation.early_stopping.patience=null")


def command(toy, name, *changes, flags=()):
    return ("train", "--config", str(toy / "toy.json"), *(part for change in [f"run.name={name}", *changes] for part in ("--set", change)), *flags)


@pytest.fixture(scope="module")
def train(toy, command_line):
    """Runs to the end; -> (run folder, result)."""

    def train(name, processes, *changes, expect=0, flags=()):
        result = command_line(processes, *command(toy, name, *changes, flags=flags))
        assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
        return toy / "runs" / name, result

    return train


@pytest.mark.parametrize(
    "stage, adapter, k",
    # CoBa's warm-up ends with observation 3.
    [(1, [], 2), (2, [LORA], 3), (3, [EXPERTS], 5)],
)
def test_a_run_killed_after_k_steps_ends_with_the_same_bits(toy, train, stage, adapter, k):
    """Packed rows, two micro-batches a step and rank; every number of every record, parameters, optimizer and balancer states, the export."""
    name = f"stage{stage}-{k}"
    changes = (*adapter, f"deepspeed.zero_optimization.stage={stage}", f"checkpoint.every_steps={k}", "checkpoint.keep=99", *LONGER)
    straight, _ = train(f"{name}-straight", 2, *changes)
    killed = toy / "runs" / name
    assert kill_when(2, command(toy, name, *changes), lambda: lines_of(killed, '"kind": "train"') > k)
    forget_after(killed, k)
    train(name, 2, *changes)
    assert differences(killed, straight) == []
    assert [record["why"] for record in records(killed, "event") if record["name"] == "resume"] == [f"from step-{k:06d}"]


ON_TWO = (NO_DROPOUT, "checkpoint.every_steps=4", "checkpoint.keep=9", "training.micro_batch_rows=1", *LONGER)


@pytest.fixture(scope="module")
def on_two(train):
    return train("on-two", 2, *ON_TWO)[0]


def test_a_run_goes_on_on_other_numbers_of_ranks_and_zero_stages_with_the_same_data_and_losses(toy, train, on_two):
    """2 ranks -> 4 ranks with ZeRO-3 -> 1 rank with ZeRO-1."""
    moved = toy / "runs" / "moved"
    shutil.copytree(on_two, moved, symlinks=True)
    forget_after(moved, 4)
    on_four = command(toy, "moved", *ON_TWO, "deepspeed.zero_optimization.stage=3")
    assert kill_when(4, on_four, lambda: (moved / "checkpoints" / "step-000008").exists())
    forget_after(moved, 8)
    train("moved", 1, *ON_TWO, "deepspeed.zero_optimization.stage=1")
    ours, theirs = records(moved, "train"), records(on_two, "train")
    assert [record["step"] for record in ours] == list(range(1, 21))
    for one, other in zip(ours, theirs, strict=True):
        for task in TASKS:
            assert one["tasks"][task]["tokens"] == other["tasks"][task]["tokens"]
            assert one["tasks"][task]["loss"] == pytest.approx(other["tasks"][task]["loss"], rel=1e-4)
            assert one["tasks"][task]["weight"] == pytest.approx(other["tasks"][task]["weight"], abs=1e-4)
    told = [record["why"] for record in records(moved, "event") if record["name"] == "resume"]
    assert "saved on 2 ranks with ZeRO-2, now 4 with ZeRO-3" in told[0] and "saved on 4 ranks with ZeRO-3, now 1 with ZeRO-1" in told[1]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(toy, train, on_two):
    damaged = toy / "runs" / "damaged"
    shutil.copytree(on_two, damaged, symlinks=True)
    file = damaged / "checkpoints" / "step-000020" / "states" / "rank-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train("damaged", 2, *ON_TWO)
    told = {record["name"]: record["why"] for record in records(damaged, "event") if record["step"] == 16}
    assert "step-000020" in told["damaged_checkpoint"] and "states/rank-0001.safetensors" in told["damaged_checkpoint"]
    assert told["resume"].startswith("from step-000016") and "step-000020" in told["set_aside"]
    assert differences(damaged, on_two) == []


def test_a_changed_config_is_refused_with_the_differences_unless_insisted(toy, train, on_two):
    changed = toy / "runs" / "changed"
    shutil.copytree(on_two, changed, symlinks=True)
    same = [*ON_TWO, "training.max_steps=22"]
    _, result = train("changed", 2, *same, "training.learning_rate=1e-3", "balancer.tau=2.0", expect=2)
    assert "training.learning_rate: 0.005 -> 0.001" in result.stderr and "balancer.tau: 5.0 -> 2.0" in result.stderr
    assert "--allow-config-change" in result.stderr and "Traceback" not in result.stderr
    assert (changed / "metrics.jsonl").read_bytes() == (on_two / "metrics.jsonl").read_bytes()
    train("changed", 2, *same, "training.learning_rate=1e-3", "balancer.tau=2.0", flags=["--allow-config-change"])
    events = {record["name"]: record["why"] for record in records(changed, "event") if record["step"] == 20}
    assert "insisted on: training.learning_rate: 0.005 -> 0.001" in events["resume"] and "training.max_steps: 20 -> 22" in events["resume"]
    assert "balancer_anew" in events
    assert [record["step"] for record in records(changed, "train")][-2:] == [21, 22]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_the_run_with_a_checkpoint_and_it_goes_on_as_if_nothing_had_happened(toy, train, on_two, number):
    name = f"signal-{number.name}"
    run = toy / "runs" / name
    changes = (*ON_TWO, "checkpoint.every_steps=100")
    with started_command(2, command(toy, name, *changes)) as started:
        while lines_of(run, '"kind": "train"') < 3 and started.running:
            time.sleep(0.01)
        started.signal(number, 1)
        results = started.wait(60)
    assert [result.returncode for result in results] == [75, 75], results
    saved = last_checkpoint(run)
    assert f"everything is saved in {saved}" in results[0].stderr and "Traceback" not in results[0].stderr
    assert json.loads((saved / "state.json").read_text())["step"] == records(run, "train")[-1]["step"]
    train(name, 2, *changes)
    assert differences(run, on_two) == []
    assert states(last_checkpoint(run)) == states(last_checkpoint(on_two))


def test_a_rank_that_is_killed_ends_the_job_with_its_name_and_the_last_step(toy):
    run = toy / "runs" / "dead"
    with started_command(4, command(toy, "dead", "training.max_steps=500")) as started:
        while lines_of(run, '"kind": "train"') < 3 and started.running:
            time.sleep(0.01)
        started.signal(signal.SIGKILL, 2)
        begun = time.monotonic()
        while started.running and time.monotonic() < begun + 59:
            time.sleep(0.1)
        ended = not started.running
        results = started.wait(1)
    assert ended and [result.returncode for result in results] == [1, 1, -9, 1], results
    told = [line for result in results for line in result.stderr.splitlines() if "rank 2" in line]
    assert len(told) == 1 and f"step {records(run, 'train')[-1]['step']}" in told[0], results
