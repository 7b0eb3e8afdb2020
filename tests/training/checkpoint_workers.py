"""An engine that writes a few bytes, and what ranks do with it: as threads of one process, or as real processes."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

from mftcoder_coba.engine import Processes
from mftcoder_coba.training import manifest
from mftcoder_coba.training.checkpoint_folder import write_file
from mftcoder_coba.training.checkpoints import Checkpoints


class Alone:
    """The only process of a run."""

    rank, world_size, is_main = 0, 1, True

    def gather_objects(self, value):
        return [value]


class Together(Alone):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, world_size: int, board: list, barrier: threading.Barrier):
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self.board, self.barrier = board, barrier

    def gather_objects(self, value):
        self.board[self.rank] = value
        self.barrier.wait(60)
        values = list(self.board)
        self.barrier.wait(60)
        return values


def on_threads(world_size: int, function) -> list:
    """What `function(processes)` returns on each of `world_size` ranks, or the exception that it raises there."""
    board, barrier, results = [None] * world_size, threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = function(Together(rank, world_size, board, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class FakeEngine:
    """Args:
    content: what each rank's file begins with.
    full: the rank whose disk is full after half of its file.
    """

    def __init__(self, processes, content: str, full: int | None = None):
        self.processes, self.content, self.full = processes, content, full

    def save(self, folder: Path) -> dict:
        rank = self.processes.rank
        name, content = f"states/rank-{rank:04d}.safetensors", f"{self.content} of rank {rank}, ".encode() * 20
        (folder / "states").mkdir(exist_ok=True)
        if rank == self.full:
            write_file(folder / name, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(folder / name, content)
        return {name: manifest.digest_of(content)}


def save(folder, step, content=None, processes=None, keep=2, best=None, full=None):
    processes = processes or Alone()
    content = content or f"step {step}"
    return Checkpoints(folder, keep).save(FakeEngine(processes, content, full), step, {"step": step, "content": content}, best)


def newest(folder, resume="auto", processes=None):
    checkpoints = Checkpoints(folder, keep=2)
    return checkpoints.newest_sound(checkpoints.candidates(resume), processes or Alone())


def content_of(checkpoint):
    return Checkpoints.read_state(checkpoint)["content"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def real_ranks(folder: str) -> None:
    """Saves, with a full disk in between, and looks for the newest sound one. Each rank writes what it saw to `folder`/seen-RANK.json."""
    processes = Processes()
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=3)
    troubles = [
        checkpoints.save(FakeEngine(processes, f"step {step}", full), step, {"step": step}, None) for step, full in ((1, None), (2, 1), (3, None))
    ]
    processes.barrier()
    if processes.is_main:
        path = checkpoints.folder / "step-000003" / "states" / "rank-0001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    processes.barrier()
    newest, damaged = checkpoints.newest_sound(checkpoints.candidates("auto"), processes)
    # The same by a relative path from a place where there is nothing, as on a machine that does not share the folder.
    os.chdir(Path(folder) if processes.is_main else "/")
    refusal = None
    try:
        Checkpoints(Path("checkpoints"), keep=3).newest_sound([Path("checkpoints/step-000001")], processes)
    except Exception as error:
        refusal = str(error)
    seen = {"troubles": troubles, "newest": newest.name, "damaged": damaged, "refusal": refusal}
    (Path(folder) / f"seen-{processes.rank}.json").write_text(json.dumps(seen))
    processes.barrier()
    processes.close()
