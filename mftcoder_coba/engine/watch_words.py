"""What the watch knows of a rank, and what it says of those that died, left or hang."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ENDING = 'The job ends. With checkpoint.resume = "auto" the same command goes on from the last checkpoint.'


class Verdict(NamedTuple):
    """Why the job ends.

    told_by: the rank that prints it. hopeless: no main thread will come back by itself. alone: each rank found it without rank 0.
    """

    text: str
    told_by: int
    hopeless: bool = False
    alone: bool = False


@dataclass
class Peer:
    """What is known of a rank. Times are those of `time.monotonic` here.

    heard: when it last told. moved: when it came to its last mark. line: of Python code where its main thread is.
    waits: that line is called by a collective. died, left: when, or None. fate, reason: how, why.
    """

    rank: int
    host: str
    pid: int
    heard: float
    moved: float = 0.0
    marks: int = 0
    step: int = 0
    doing: str = "start"
    line: str = ""
    waits: bool = False
    died: float | None = None
    fate: str = "died"
    left: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.moved = self.heard

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def place(self) -> str:
        return f"step {self.step} ({self.doing})"

    def hear(self, record: dict[str, Any], now: float) -> None:
        """record: marks, step, doing, line, waits."""
        self.heard = now
        if record["marks"] != self.marks:
            self.moved = now
        vars(self).update(record)

    def lose(self, now: float) -> None:
        """Its connection ended and it had not left. The system tells what ended it until its parent has asked."""
        self.died = now
        fields = _status(self.pid) if self.host == socket.gethostname() else []
        code = int(fields[-1]) & 127 if fields else 0
        if code in set(signal.Signals):
            self.fate = f"was killed by {signal.Signals(code).name}"


def death(dead: list[Peer], witness: Peer, told_by: int) -> Verdict:
    """`witness`: a living rank, which cannot be further than the step in which it misses the dead."""
    parts = []
    for peer in dead:
        # The last word of a rank may be half a second old, and some short steps behind.
        place = peer.place if peer.step >= witness.step else f"step {witness.step}"
        parts.append(f"{peer} {peer.fate} in {place}")
    return Verdict(f"{'; '.join(parts)}. {ENDING}", told_by)


def leaving(left: list[Peer], told_by: int) -> Verdict:
    parts = [f"{peer} ended in {peer.place}: {peer.reason}" for peer in left]
    return Verdict(f"{'; '.join(parts)}. {ENDING}", told_by)


def silence(silent: list[Peer], now: float, told_by: int) -> Verdict:
    parts = [f"{peer} has not been heard of for {_duration(now - peer.heard)}; it was last in {peer.place}" for peer in silent]
    return Verdict(f"{'. '.join(parts)}. {ENDING}", told_by, hopeless=True)


def hang(living: list[Peer], now: float, told_by: int) -> Verdict:
    """No rank has got on: those that are behind the others hold them up, or those that wait for nobody."""
    behind = min((peer.step, peer.marks) for peer in living)
    last = [peer for peer in living if (peer.step, peer.marks) == behind]
    hanging = [peer for peer in last if not peer.waits] or last
    others = [peer for peer in living if peer not in hanging]
    duration = _duration(now - max(peer.moved for peer in living))
    # Where nobody is behind, only those that wait in a collective are known to wait: on GPUs a rank may wait anywhere.
    if others:
        first = max(others, key=lambda peer: (peer.step, peer.marks))
        names = ", ".join(f"{peer} at {peer.line}" for peer in hanging)
        verb, they = ("hangs", "it has") if len(hanging) == 1 else ("hang", "they have")
        text = f"{names} {verb}: {they} been in {last[0].place} for {duration}, while the others wait in {first.place}"
    else:
        text = f"no rank has got on for {duration}: all are in {last[0].place}, rank {last[0].rank} at {last[0].line}"
    return Verdict(f"{text}. run.hang_timeout_minutes sets how long that may take. {ENDING}", told_by, hopeless=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, or is stopped."""
    fields = _status(pid)
    if fields:
        return fields[0] not in "ZX"
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _status(pid: int) -> list[str]:
    """The fields after the name in /proc/PID/stat: the state first, the exit code last; [] where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
