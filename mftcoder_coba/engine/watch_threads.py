"""The threads of the watch: one on each rank of a run of several."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from mftcoder_coba.engine.watch_links import Link
from mftcoder_coba.engine.watch_words import Peer, Verdict, death, hang, is_alive, leaving, silence
from mftcoder_coba.errors import RunFailure

BEAT_SECONDS = 0.5
SETTLE_SECONDS = 0.5  # after a death: others that die of the same cause are named with it, and the living have come to where they miss it
LEFT_SECONDS = 2.0  # that a rank may be the first to leave; at an end that all come to, and with an error that all meet, it is never as long
SILENT_SECONDS = 10.0  # without a word from a rank, while a collective has failed and no rank is known to have died
GRACE_SECONDS = 10.0  # that the main thread has, after a death, to come back with an error of its own
HEED_SECONDS = 2.0  # that a process stays after it knows the reason, where others need it to be alive to know it as well
ENDING_SECONDS = 30.0  # that a process which raised the reason has to end
FAREWELL_SECONDS = 5.0  # that rank 0 waits for the others at its end
FROZEN_SECONDS = 5.0  # between two turns of the thread: this process was stopped, and what it knows of times is worth nothing


class Watcher(threading.Thread, ABC):
    """What the threads of all ranks have in common.

    Args:
        place: (marks so far, step, doing) of the main thread.
        timeout_seconds: without a new mark on any rank, after which the job hangs.
    """

    def __init__(self, rank: int, place: Callable[[], tuple[int, int, str]], peers: list[Peer], timeout_seconds: float):
        super().__init__(name="watch", daemon=True)
        self.place, self.peers, self.timeout_seconds = place, peers, timeout_seconds
        self.own = peers[rank]
        self.decided = threading.Event()
        self.verdict: Verdict | None = None
        self.troubled = self.explained = self.leaving = self.finished = self._ending = False
        self._deadline = self._next_beat = 0.0
        self._end = threading.Lock()  # for who tells the verdict: the main thread or this one
        self._turned = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self.listen_to(self._ear, lambda: self._ear.recv(64))

    def run(self) -> None:
        while not self.finished:
            for key, _ in self._selector.select(BEAT_SECONDS / 2):
                key.data()
            now = time.monotonic()
            if now - self._turned > FROZEN_SECONDS:
                for peer in self.peers:
                    peer.heard = peer.moved = now
            self._turned = now
            record = dict(zip(("marks", "step", "doing"), self.place(), strict=True)) | _main_thread()
            self.own.hear(record, now)
            if now >= self._next_beat:
                self._next_beat = now + BEAT_SECONDS
                self.tell(record)
            if self.verdict is None:
                self.judge(now)
            elif not self.leaving and self._end_begins(now):
                self.end_process(now)
            if self.leaving:
                self.take_leave(now)
        self._selector.close()
        self._bell.close()
        self._ear.close()

    def raised(self) -> Verdict:
        """The main thread raises the verdict: it has until the new deadline to end the process in the ordinary way.

        Where the thread has begun to end the process, this does not return.
        """
        with self._end:
            self.explained = True
            self._deadline = time.monotonic() + ENDING_SECONDS
            return self.verdict

    def leave(self, reason: str) -> None:
        self.own.reason = reason
        self.leaving = True
        with contextlib.suppress(OSError):  # it has seen it already, and ended
            self._bell.send(b".")

    def decide(self, verdict: Verdict) -> None:
        self.verdict = verdict
        grace = GRACE_SECONDS if not verdict.hopeless else HEED_SECONDS if verdict.alone else 0.0
        self._deadline = time.monotonic() + grace
        self.decided.set()

    def _end_begins(self, now: float) -> bool:
        """Takes the lock for ever when the time has come."""
        if not self._ending and self._end.acquire(blocking=False):
            self._ending = now >= self._deadline
            if not self._ending:
                self._end.release()
        return self._ending

    def end_process(self, now: float) -> None:
        """The main thread is stuck where no exception reaches it."""
        if self.verdict.told_by == self.own.rank:
            os.write(2, f"error: {self.verdict.text}\n".encode())
        os._exit(RunFailure.exit_code)

    def listen_to(self, source: Any, callback: Callable[[], Any]) -> None:
        self._selector.register(source, selectors.EVENT_READ, callback)

    def hang_up(self, link: Link) -> None:
        self._selector.unregister(link)
        link.close()

    @abstractmethod
    def tell(self, message: dict[str, Any]) -> None:
        """To every rank that this one is connected with."""

    @abstractmethod
    def judge(self, now: float) -> None:
        """Decides, where there is something to decide."""

    @abstractmethod
    def take_leave(self, now: float) -> None:
        """Sets `finished` when those who must know have heard that this rank leaves."""


def _main_thread() -> dict[str, Any]:
    """Its `line`, and whether it `waits` in a collective."""
    frame = sys._current_frames()[threading.main_thread().ident]
    line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
    while frame and frame.f_code.co_filename != torch.distributed.distributed_c10d.__file__:
        frame = frame.f_back
    return {"line": line, "waits": frame is not None}


class Judge(Watcher):
    """Rank 0: hears all, judges, tells all."""

    def __init__(
        self, rank: int, place: Callable[[], tuple[int, int, str]], peers: list[Peer], timeout_seconds: float, server: socket.socket, token: str
    ):
        super().__init__(rank, place, peers, timeout_seconds)
        self._server, self._token = server, token
        self._links: dict[int, Link] = {}  # by rank, of those who are there
        self._told = False
        self.listen_to(server, self._accept)

    def _accept(self) -> None:
        try:
            link = Link(self._server.accept()[0])
        except OSError:  # it has gone again
            return
        self.listen_to(link, lambda: self._greet(link))

    def _greet(self, link: Link) -> None:
        """The first word on a connection: who it is. Strangers are turned away."""
        messages = link.receive()
        if messages == []:
            return
        if messages is None or messages[0].get("token") != self._token:
            self.hang_up(link)
            return
        peer = self.peers[messages[0]["rank"]]
        self._links[peer.rank] = link
        self._selector.modify(link, selectors.EVENT_READ, lambda: self._hear(peer, link))
        self._take(peer, messages[1:])

    def _hear(self, peer: Peer, link: Link) -> None:
        messages = link.receive()
        if messages is not None:
            self._take(peer, messages)
            return
        peer.lose(time.monotonic())
        self.hang_up(self._links.pop(peer.rank))

    def _take(self, peer: Peer, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "left" not in message:
                peer.hear(message, time.monotonic())
                continue
            peer.left, peer.reason = time.monotonic(), message["left"]
            self.hang_up(self._links.pop(peer.rank))  # which tells it that it was heard
            return

    def tell(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            link.send(message)

    def decide(self, verdict: Verdict) -> None:
        super().decide(verdict)
        self.tell({"verdict": verdict})

    def judge(self, now: float) -> None:
        living = [peer for peer in self.peers if peer.died is None and peer.left is None]
        silent = [peer for peer in living if now - peer.heard > (SILENT_SECONDS if self.troubled else self.timeout_seconds / 2)]
        told_by = min((peer.rank for peer in living if peer not in silent), default=0)
        if any(peer.died and now - peer.died > SETTLE_SECONDS for peer in self.peers):
            self.decide(death([peer for peer in self.peers if peer.died], self.own, told_by))
        elif living and any(peer.left and now - peer.left > LEFT_SECONDS for peer in self.peers):
            self.decide(leaving([peer for peer in self.peers if peer.left], told_by))
        elif living and now - max(peer.moved for peer in living) > self.timeout_seconds:
            self.decide(silence(silent, now, told_by) if silent else hang(living, now, told_by))
        elif self.troubled and silent:
            self.decide(silence(silent, now, told_by))

    def end_process(self, now: float) -> None:
        """Last of all, so that every other rank has the reason from this one."""
        if not self._told and self.verdict.told_by == self.own.rank:
            os.write(2, f"error: {self.verdict.text}\n".encode())
        self._told = True
        if not self._links or now > self._deadline + FAREWELL_SECONDS:
            os._exit(RunFailure.exit_code)

    def take_leave(self, now: float) -> None:
        if self.own.left is None:
            self.own.left = now
            self.tell({"left": self.own.reason})
        if not self._links or now > self.own.left + FAREWELL_SECONDS:
            for link in self._links.values():
                link.close()
            self._server.close()
            self.finished = True


class Teller(Watcher):
    """Every other rank: tells rank 0 where it is, and hears what became of the others."""

    def __init__(self, rank: int, place: Callable[[], tuple[int, int, str]], peers: list[Peer], timeout_seconds: float, link: Link):
        super().__init__(rank, place, peers, timeout_seconds)
        self._link, self._head = link, peers[0]
        self.listen_to(link, self._hear)

    def _hear(self) -> None:
        messages = self._link.receive()
        now = time.monotonic()
        if messages is None:
            self._head.lose(now)
            self.hang_up(self._link)
        for message in messages or []:
            if "verdict" in message:
                self.decide(Verdict(*message["verdict"]))
            elif "left" in message:
                self._head.left, self._head.reason = now, message["left"]
            else:
                self._head.hear(message, now)

    def tell(self, message: dict[str, Any]) -> None:
        if not self._head.died:
            self._link.send(message)

    def judge(self, now: float) -> None:
        """Rank 0 itself. Where it cannot say who tells the reason, the first of each machine does."""
        limit = SILENT_SECONDS if self.troubled else self.timeout_seconds
        gone = self._head.died and now - self._head.died > SETTLE_SECONDS
        if not gone and now - self._head.heard <= limit:
            return
        neighbours = [peer.rank for peer in self.peers[1:] if peer.host == self.own.host and is_alive(peer.pid)]
        told_by = min([*neighbours, self.own.rank])
        if not gone:
            verdict = silence([self._head], now, told_by)
        elif self._head.left:
            verdict = leaving([self._head], told_by)
        else:
            verdict = death([self._head], self.own, told_by)
        self.decide(verdict._replace(alone=True))

    def take_leave(self, now: float) -> None:
        """Rank 0 closes the connection when it has heard it."""
        if self.own.left is None:
            self.own.left = now
            self.tell({"left": self.own.reason})
        if self._head.died or now > self.own.left + FAREWELL_SECONDS:
            self._link.close()
            self.finished = True
