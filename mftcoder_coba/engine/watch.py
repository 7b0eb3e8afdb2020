"""The watch over the ranks of a run: one that dies or hangs ends all of them in a bounded time, with one message that names it.

Each rank has a thread with a TCP connection to rank 0, and tells twice a second where it is. The system closes the connection of
a process that dies; a rank that leaves of its own accord says so before. Rank 0 judges and tells the others. What becomes of rank 0
itself the others judge alone, each for itself.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from mftcoder_coba.engine.watch_links import connect, listen
from mftcoder_coba.engine.watch_threads import FAREWELL_SECONDS, HEED_SECONDS, Judge, Teller
from mftcoder_coba.engine.watch_words import Peer
from mftcoder_coba.errors import RunFailure

EXPLAIN_SECONDS = 5.0  # that a failed collective waits for the reason


class RankFailure(RunFailure):
    """A rank died or hangs. All living ranks raise it; `told_by` is the one whose command line prints it."""

    def __init__(self, message: str, told_by: int):
        super().__init__(message)
        self.told_by = told_by


class Watch:
    """The main thread's side of the watch. Nothing happens in a run of one process.

    Args:
        gather_objects: `Processes.gather_objects`.
    """

    def __init__(self, rank: int, world_size: int, gather_objects: Callable[[Any], list[Any]]):
        self.rank, self.world_size, self._gather_objects = rank, world_size, gather_objects
        self.place = (0, 0, "start")  # (marks so far, step, doing); replaced as a whole, so that the thread never reads half of it
        self._watcher: Judge | Teller | None = None

    def start(self, timeout_seconds: float) -> None:
        """Collective. From here on, all processes end when one dies, or when no rank has come to a new mark for `timeout_seconds`."""
        if self.world_size == 1:
            return
        server = listen() if self.rank == 0 else None
        token = secrets.token_hex(16)
        identities = self._gather_objects((socket.gethostname(), os.getpid(), token, server and server.getsockname()[1]))
        peers = [Peer(rank, host, pid, time.monotonic()) for rank, (host, pid, *_) in enumerate(identities)]
        _, _, token, port = identities[0]
        if server:
            self._watcher = Judge(self.rank, lambda: self.place, peers, timeout_seconds, server, token)
        else:
            link = connect(os.environ["MASTER_ADDR"], port)
            link.send({"token": token, "rank": self.rank})
            self._watcher = Teller(self.rank, lambda: self.place, peers, timeout_seconds, link)
        self._watcher.start()
        atexit.register(self.stop)

    def mark(self, doing: str, step: int | None = None) -> None:
        """Notes that this rank has come to `doing`, in `step` (None: the step of the last mark). Costs nothing; all ranks set the same marks."""
        marks, last, _ = self.place
        self.place = (marks + 1, last if step is None else step, doing)

    def explain(self, error: BaseException) -> RankFailure | None:
        """Why a collective failed: what the main thread raises instead of `error`.

        Waits a few seconds for the answer. The process then ends itself if the main thread does not within half a minute.

        Returns:
            None where every rank is there, so that `error` is this rank's own, and where it is a message already.
        """
        if self._watcher is None or isinstance(error, RunFailure):
            return None
        self._watcher.troubled = True
        if not self._watcher.decided.wait(EXPLAIN_SECONDS):
            return None
        verdict = self._watcher.raised()
        # Rank 0's connections carry the reason; without rank 0, the living of a machine find out by each other who tells it.
        if self.rank == 0 or verdict.alone:
            time.sleep(HEED_SECONDS)
        return RankFailure(verdict.text, verdict.told_by)

    def stop(self) -> None:
        """This rank leaves: after a barrier at the end of the work, or with an error of its own. Again: nothing.

        Ranks that do not follow within seconds end too, and say that this one left, and with which error: the one that is being
        handled where this is called, as in a `finally`. After `explain` gave a reason the thread stays, to
        end a process that cannot.
        """
        if self._watcher is None or self._watcher.explained:
            return
        error = sys.exception()
        self._watcher.leave(traceback.format_exception_only(error)[-1].strip() if error else "it left before the end")
        self._watcher.join(2 * FAREWELL_SECONDS)
        self._watcher = None
        atexit.unregister(self.stop)
