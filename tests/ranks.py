"""Real processes for tests: a function or a command on several ranks of one run, as a launcher would start them.

They are forked from one process that has imported what a run imports: that takes longer than most tests.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
PRELOADED = [
    "mftcoder_coba.training",
    "mftcoder_coba.reporting.report",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
]
GRACE_SECONDS = 60.0  # that ranks have to end when one of them has failed


def run_ranks(
    file: str, function: str, world_size: int, *arguments: Any, timeout: float = 900, check: bool = True
) -> list[subprocess.CompletedProcess]:
    """Calls `function(*arguments)` of a Python file on `world_size` processes.

    Returns:
        each rank's exit code and output (both streams in `stdout`); with `check`, all exit codes are 0.
    """
    results = _on_ranks(world_size, ROOT, timeout, _call, (str(Path(file).resolve()), function, arguments))
    results = [subprocess.CompletedProcess(result.args, result.returncode, result.stdout + result.stderr) for result in results]
    if check:
        for rank, result in enumerate(results):
            assert result.returncode == 0, f"rank {rank} of {world_size} ended with {result.returncode}:\n{result.stdout[-4000:]}"
    return results


def run_command(processes: int, arguments: tuple[str, ...], cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess:
    """`mftcoder_coba ARGUMENTS` on that many ranks; their output one after another, and the first exit code that is not 0."""
    results = _on_ranks(processes, cwd, timeout, _command, arguments)
    code = next((result.returncode for result in results if result.returncode), 0)
    return subprocess.CompletedProcess(arguments, code, "".join(result.stdout for result in results), "".join(result.stderr for result in results))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """Ranks that run: to be signalled, killed, waited for."""

    def __init__(self, processes: list, arguments: tuple, outputs: list[list]):
        self.processes, self._arguments, self._outputs = processes, arguments, outputs

    def signal(self, number: int, *ranks: int) -> None:
        """To those ranks; without any to all that live."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, number)

    def output(self, rank: int) -> str:
        """What it has written so far, both streams."""
        return "".join(Path(file.name).read_text(encoding="utf-8") for file in self._outputs[rank])

    @property
    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def wait(self, timeout: float = 900) -> list[subprocess.CompletedProcess]:
        """Until all have ended; each rank's exit code (-N: killed by signal N) and output."""
        _wait(self.processes, timeout)
        texts = [[Path(file.name).read_text(encoding="utf-8") for file in pair] for pair in self._outputs]
        return [subprocess.CompletedProcess(self._arguments, process.exitcode, *pair) for process, pair in zip(self.processes, texts, strict=True)]


@contextmanager
def started_command(processes: int, arguments: tuple[str, ...], cwd: Path = ROOT) -> Iterator[Started]:
    """`mftcoder_coba ARGUMENTS` on that many ranks, running; what still lives at the end is killed."""
    with _started(processes, cwd, _command, arguments) as started:
        yield started


def _on_ranks(world_size: int, cwd: Path, timeout: float, target: Callable, arguments: tuple) -> list[subprocess.CompletedProcess]:
    with _started(world_size, cwd, target, arguments) as started:
        return started.wait(timeout)


@contextmanager
def _started(world_size: int, cwd: Path, target: Callable, arguments: tuple) -> Iterator[Started]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    shared = ENVIRONMENT | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        outputs = [
            [files.enter_context(open(Path(folder) / f"{rank}.{name}", "w+", encoding="utf-8")) for name in ("out", "err")]
            for rank in range(world_size)
        ]
        processes = []
        for rank, (out, err) in enumerate(outputs):
            # One process alone starts as it does without a launcher.
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else ENVIRONMENT
            processes.append(context.Process(target=_begin, args=(environment, str(cwd), out.name, err.name, target, arguments)))
        for process in processes:
            process.start()
        try:
            yield Started(processes, arguments, outputs)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list, timeout: float) -> None:
    """Until all have ended. The others of a failed one, and all at the time-out, are killed."""
    end = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                end = min(end, time.monotonic() + GRACE_SECONDS)
            connection.wait([process.sentinel for process in processes if process.exitcode is None], 0.2)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _begin(environment: dict[str, str], cwd: str, out: str, err: str, target: Callable, arguments: tuple) -> None:
    for number, name in ((1, out), (2, err)):
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    os.chdir(cwd)
    target(*arguments)


def _call(file: str, function: str, arguments: tuple) -> None:
    spec = importlib.util.spec_from_file_location("worker", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, function)(*arguments)


def _command(*arguments: str) -> None:
    from mftcoder_coba.cli import main

    sys.argv = ["mftcoder_coba", *arguments]
    main()
