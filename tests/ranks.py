"""Runs a function on several real processes of one run, as a launcher would start them.

`run_ranks` is for tests; run as a program, this file is one of the processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(
    file: str, function: str, world_size: int, *arguments: Any, timeout: int = 600, check: bool = True
) -> list[subprocess.CompletedProcess]:
    """Calls `function(*arguments)` of a Python file on `world_size` processes; arguments travel as JSON.

    Returns:
        each rank's exit code and output; with `check`, all exit codes are 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [open(Path(folder) / f"{rank}.log", "w+", encoding="utf-8") for rank in range(world_size)]
        for rank, log in enumerate(logs):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                # As the launcher finds them: another ninja would make DeepSpeed compile its extension again.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
            command = [sys.executable, __file__, str(Path(file).resolve()), function, json.dumps(arguments)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        results = []
        for process, code, log in zip(processes, codes, logs, strict=True):
            log.seek(0)
            results.append(subprocess.CompletedProcess(process.args, code, stdout=log.read()))
            log.close()
    if check:
        for rank, result in enumerate(results):
            assert result.returncode == 0, f"rank {rank} of {world_size} ended with {result.returncode}:\n{result.stdout[-4000:]}"
    return results


if __name__ == "__main__":
    path, name, text = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(*json.loads(text))
