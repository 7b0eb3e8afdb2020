"""A rank that dies or hangs ends the job in a bounded time, and is named; real processes."""

import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import free_port, run_ranks

from mftcoder_coba.engine.watch import Watch
from mftcoder_coba.engine.watch_links import listen
from mftcoder_coba.engine.watch_threads import Judge
from mftcoder_coba.engine.watch_words import Peer, death, hang

WORKERS = str(Path(__file__).with_name("watch_workers.py"))
RANKS = 4
HANG_SECONDS = 9.0
JOBS = {  # what happens in the seventh step: (to which ranks, whether the others wait where no exception reaches them, the time-out)
    "kill, in a collective": ("kill", [2], False, 600.0),
    "kill rank 0, in a collective": ("kill", [0], False, 600.0),
    "kill, stuck": ("kill", [2], True, 600.0),
    "kill rank 0, stuck": ("kill", [0], True, 600.0),
    "sleep": ("sleep", [1], False, HANG_SECONDS),
    "freeze": ("freeze", [3], False, HANG_SECONDS),
    "freeze rank 0": ("freeze", [0], False, HANG_SECONDS),
    "defect": ("defect", [1], True, 600.0),
    "defect of rank 0": ("defect", [0], True, 600.0),
    "mistake": ("mistake", [0, 1, 2, 3], False, 600.0),
    "same defect": ("same_defect", [0, 1, 2, 3], False, 600.0),
    "nothing": ("nothing", [], False, 600.0),
}


@dataclass
class Ended:
    """A job that has ended: exit codes by rank, all output, and the messages in it."""

    codes: list[int]
    output: str

    @property
    def messages(self) -> list[str]:
        return re.findall(r"^error: .*", self.output, re.MULTILINE)

    def told(self, pattern: str) -> str | None:
        """The one message, where it fits."""
        (message,) = self.messages
        return message if re.match(f"error: {pattern}", message) else pytest.fail(message)


@pytest.fixture(scope="module")
def ended() -> dict[str, Ended]:
    """All jobs, beside each other: most of their time is waiting. A rank that does not end by itself is killed a minute after the first fault."""
    names = ("fault", "victims", "stuck", "timeout_seconds", "port")
    jobs = [dict(zip(names, (*job, free_port()), strict=True)) for job in JOBS.values()]
    results = run_ranks(WORKERS, "run_all", RANKS * len(jobs), jobs, RANKS, check=False)
    parts = [results[start : start + RANKS] for start in range(0, len(results), RANKS)]
    return {
        name: Ended([result.returncode for result in part], "".join(result.stdout for result in part)) for name, part in zip(JOBS, parts, strict=True)
    }


def test_a_rank_that_is_killed_ends_all_others_and_is_named_with_the_step(ended):
    job = ended["kill, in a collective"]
    assert job.codes == [1, 1, -9, 1]
    assert job.told(r"rank 2 \(host \S+, process \d+\) (died|was killed by SIGKILL) in step 7\b.* goes on from the last checkpoint")


def test_rank_0_may_be_the_one_that_is_killed(ended):
    job = ended["kill rank 0, in a collective"]
    assert job.codes == [-9, 1, 1, 1]
    assert job.told(r"rank 0 \(host \S+, process \d+\) (died|was killed by SIGKILL) in step 7\b")


@pytest.mark.parametrize(("name", "victim"), [("kill, stuck", 2), ("kill rank 0, stuck", 0)])
def test_a_killed_rank_ends_ranks_that_no_exception_reaches(ended, name, victim):
    job = ended[name]
    assert job.codes == [-9 if rank == victim else 1 for rank in range(RANKS)]
    assert job.told(rf"rank {victim} \(.*\) (died|was killed by SIGKILL) in step 7\b")


def test_a_rank_that_sleeps_for_ever_is_named_as_the_one_that_the_others_wait_for(ended):
    assert ended["sleep"].codes == [1, 1, 1, 1]
    assert ended["sleep"].told(
        r"rank 1 \(.*\) at watch_workers.py:\d+ \(sleep\) hangs: it has been in step 7 \(forward\) for \d+ s, while the others wait"
    )


@pytest.mark.parametrize(("name", "victim"), [("freeze", 3), ("freeze rank 0", 0)])
def test_a_rank_that_is_stopped_is_named_as_one_that_is_not_heard_of(ended, name, victim):
    job = ended[name]
    assert job.codes == [-9 if rank == victim else 1 for rank in range(RANKS)]
    assert job.told(rf"rank {victim} \(.*\) has not been heard of for \d+ s; it was last in step 7 \(forward\)")


@pytest.mark.parametrize(("name", "victim"), [("defect", 1), ("defect of rank 0", 0)])
def test_a_rank_with_a_defect_shows_its_traceback_and_ends_the_others(ended, name, victim):
    job = ended[name]
    assert job.codes == [1, 1, 1, 1]
    assert "KeyError: 'a defect of this rank'" in job.output
    assert job.told(rf"rank {victim} \(.*\) ended in step 7 \(forward\): KeyError: 'a defect of this rank'")


def test_a_mistake_that_all_ranks_meet_is_told_once_and_as_it_is(ended):
    assert ended["mistake"].codes == [2, 2, 2, 2]
    assert ended["mistake"].output == "error: a mistake that all ranks meet\n"


def test_an_error_of_all_ranks_keeps_its_traceback(ended):
    job = ended["same defect"]
    assert job.codes == [1, 1, 1, 1]
    assert job.output.count("RuntimeError: a defect of all ranks\n") >= RANKS
    assert job.messages == []


def test_an_orderly_end_says_nothing_and_leaves_no_thread(ended):
    assert ended["nothing"] == Ended([0, 0, 0, 0], "")


def test_one_process_alone_has_no_watch():
    watch = Watch(0, 1, gather_objects=lambda value: pytest.fail("there is nobody to ask"))
    before = threading.active_count()
    watch.start(1.0)
    watch.mark("forward", 1)
    assert threading.active_count() == before
    assert watch.explain(RuntimeError()) is None
    watch.stop()


def peer(rank: int, step: int, marks: int, waits: bool = False) -> Peer:
    return Peer(rank, "node", 100 + rank, heard=0.0, step=step, marks=marks, doing="forward", line="model.py:7 (forward)", waits=waits)


def test_ranks_that_die_together_are_named_together():
    text = death([peer(1, 3, 9), peer(2, 2, 8)], peer(0, 3, 9), told_by=0).text
    assert text.startswith("rank 1 (host node, process 101) died in step 3 (forward); rank 2 (host node, process 102) died in step 3. ")


def test_the_rank_with_the_fewest_marks_hangs():
    text = hang([peer(0, 4, 9), peer(1, 3, 8), peer(2, 4, 9)], 1800.0, told_by=0).text
    assert text.startswith("rank 1 (host node, process 101) at model.py:7 (forward) hangs: it has been in step 3 (forward) for 30 minutes, while the")


def test_of_ranks_in_the_same_place_the_one_that_waits_in_no_collective_hangs():
    text = hang([peer(0, 3, 9, waits=True), peer(1, 3, 9), peer(2, 3, 9, waits=True)], 1800.0, told_by=0).text
    assert text.startswith("rank 1 (host node, process 101) at model.py:7 (forward) hangs: ")


@pytest.mark.parametrize("waits", [False, True])
def test_where_all_ranks_are_in_the_same_place_none_is_accused(waits):
    text = hang([peer(rank, 3, 9, waits) for rank in range(3)], 1800.0, told_by=0).text
    assert text.startswith("no rank has got on for 30 minutes: all are in step 3 (forward), rank 0 at model.py:7 (forward). ")


def test_a_stranger_that_connects_is_turned_away():
    server, watch = listen(), Watch(0, 2, gather_objects=lambda value: pytest.fail("not called"))
    peers = [Peer(rank, "node", 100 + rank, time.monotonic()) for rank in range(2)]
    judge = Judge(0, lambda: watch.place, peers, 600.0, server, token="secret")
    judge.start()
    for word in (b"GET / HTTP/1.1\r\n\r\n", b"7\n", b'{"token": "guess", "rank": 1}\n', b"\xff\n"):
        with socket.create_connection(("127.0.0.1", server.getsockname()[1]), 30) as stranger:
            stranger.sendall(word)
            assert stranger.recv(1) == b""
    assert judge.is_alive()
    assert judge.verdict is None
    judge.leave("the test is over")
    judge.join(30)
    assert not judge.is_alive()
