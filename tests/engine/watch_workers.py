"""What ranks do in tests of the watch: a loop of steps, in which something happens to one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from mftcoder_coba.engine import Processes, watch, watch_threads
from mftcoder_coba.errors import UserError

FAULT_STEP = 7
pids: list[int] = []  # of all ranks of the job


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Until it is killed, when the others have ended, or after 50 s."""
    time.sleep(1)  # others hear that it has come so far
    others = " || ".join(f"kill -0 {pid} 2>/dev/null" for pid in pids if pid != os.getpid())
    wait = f"for n in $(seq 100); do {{ {others}; }} && sleep 0.5 || break; done"
    subprocess.Popen(["bash", "-c", f"{wait}; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(1000)


def defect() -> None:
    raise KeyError("a defect of this rank")


def mistake() -> None:
    time.sleep(0.1 * float(os.environ["RANK"]))  # ranks do not meet it in the same moment
    raise UserError("a mistake that all ranks meet")


def same_defect() -> None:
    raise RuntimeError("a defect of all ranks")


def nothing() -> None:
    pass


def run_all(jobs: list[dict[str, Any]], ranks: int) -> None:
    """Several jobs beside each other, each on `ranks` of the processes; see `run`."""
    number, rank = divmod(int(os.environ["RANK"]), ranks)
    job = jobs[number]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(job.pop("port"))}
    run(**job)


def run(fault: str, victims: list[int], stuck: bool, timeout_seconds: float) -> None:
    """Steps until the fault, as the trainer and the command line do them.

    Args:
        fault: the name of a function above.
        stuck: the others wait where no exception reaches them, as they do in a collective of NCCL.
    """
    watch_threads.GRACE_SECONDS = 3.0
    watch.EXPLAIN_SECONDS = 3.0
    if len(victims) > 1:
        watch_threads.LEFT_SECONDS = 8.0  # a busy machine may let one rank meet it later than another
    processes = Processes(timeout_seconds)
    pids.extend(processes.gather_objects(os.getpid()))
    processes.watch.start(timeout_seconds)
    happens = globals()[fault] if processes.rank in victims else sleep if stuck else nothing
    try:
        try:
            loop(processes, happens)
            processes.barrier()
        except RuntimeError as error:
            raise processes.watch.explain(error) or error from error
        finally:
            processes.watch.stop()
    except (UserError, watch.RankFailure) as error:
        if processes.rank == getattr(error, "told_by", 0):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    processes.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "watch"] == []


def loop(processes: Processes, happens: Callable[[], None]) -> None:
    for step in range(1, FAULT_STEP + 3):
        processes.watch.mark("forward", step)
        if step == FAULT_STEP:
            happens()
        processes.all_reduce_sum(torch.ones(1))
        processes.watch.mark("optimizer", step)
