"""Runs that are killed and started again, and what must then be equal to a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ranks import started_command

CLOCKS = ("tokens_per_second", "seconds")


def records(run: Path, *kinds: str) -> list[dict]:
    """Records of these kinds, without what a clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] in kinds]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in found]


def lines_of(run: Path, kind: str = '"kind"') -> int:
    """Whole lines with that text so far."""
    path = run / "metrics.jsonl"
    return sum(kind in line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")) if path.is_file() else 0


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-??????"))


def forget_after(run: Path, step: int) -> None:
    """Removes checkpoints of later steps: as if the run had been killed before the next one, however late the kill came."""
    for checkpoint in (run / "checkpoints").glob("step-??????"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    (run / "checkpoints" / "latest").unlink(missing_ok=True)


def states(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files that hold parameters and optimizer states."""
    files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: file["sha256"] for name, file in files.items() if name != "state.json"}


def balancer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["balancer"]


def differences(killed: Path, straight: Path) -> list[str]:
    """What is not the same, to the bit, in two runs that have ended. Empty: nothing."""
    found = [f"{kind} records" for kind in ("train", "balancer", "validation") if records(killed, kind) != records(straight, kind)]
    ours, theirs = last_checkpoint(killed), last_checkpoint(straight)
    if ours.name != theirs.name:
        found.append(f"last checkpoint {ours.name}, not {theirs.name}")
    if states(ours) != states(theirs):
        found.append("parameters or optimizer states")
    if balancer_state(ours) != balancer_state(theirs):
        found.append("balancer state")
    exported = sorted(path.name for path in (straight / "export").glob("*.safetensors"))
    if not exported or any((killed / "export" / name).read_bytes() != (straight / "export" / name).read_bytes() for name in exported):
        found.append("exported model")
    return found


def kill_when(processes: int, arguments: tuple[str, ...], moment: Callable[[], bool], ranks: tuple[int, ...] = (), timeout: float = 300) -> bool:
    """Starts the command and kills ranks (all, if none is named) with SIGKILL as soon as `moment()`; False if it ended before."""
    with started_command(processes, arguments) as started:
        end = time.monotonic() + timeout
        while not moment():
            if not started.running:
                results = started.wait()
                assert all(result.returncode == 0 for result in results), results[0].stdout[-2000:] + results[0].stderr[-2000:]
                return False
            assert time.monotonic() < end, "the moment did not come"
            time.sleep(0.001)
        started.signal(signal.SIGKILL, *ranks)
        started.wait(90)
    return True


@dataclass
class Tally:
    """What random kills hit."""

    kills: int = 0
    while_saving: int = 0
    of_one_rank: int = 0
    at_steps: list[int] = field(default_factory=list)


def kill_at_random(run: Path, processes: int, arguments: tuple[str, ...], kills: int, rng: random.Random) -> Tally:
    """Kills the run `kills` times, every second time while it saves if it comes to that, then lets it end."""
    tally = Tally()
    while tally.kills < kills:
        ranks = (rng.randrange(processes),) if rng.random() < 0.4 else ()
        moment = _while_saving(run, rng.uniform(0, 0.02)) if tally.kills % 2 else _after_records(run, rng.randint(0, 14), rng.uniform(0, 0.2))
        assert kill_when(processes, arguments, moment, ranks), f"the run ended after {tally.kills} kills: take more steps"
        tally.kills += 1
        tally.of_one_rank += bool(ranks)
        tally.while_saving += any((run / "checkpoints").glob("*.partial"))
        tally.at_steps.append(max((record["step"] for record in records(run, "train")), default=0))
    with started_command(processes, arguments) as started:
        results = started.wait()
    assert all(result.returncode == 0 for result in results), results[0].stdout[-2000:] + results[0].stderr[-2000:]
    return tally


def _while_saving(run: Path, delay: float) -> Callable[[], bool]:
    """A moment `delay` seconds after a checkpoint has begun to be written."""
    left_before = set((run / "checkpoints").glob("*.partial"))
    return _later(delay, lambda: bool(set((run / "checkpoints").glob("*.partial")) - left_before))


def _after_records(run: Path, wanted: int, delay: float) -> Callable[[], bool]:
    """A moment `delay` seconds after the run has written `wanted` lines more than there were, or has cut some and gone on."""
    before = lines_of(run)
    return _later(delay, lambda: lines_of(run) > before + wanted)


def _later(delay: float, event: Callable[[], bool]) -> Callable[[], bool]:
    begun: list[float] = []

    def moment() -> bool:
        if not begun and event():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() >= begun[0] + delay

    return moment
