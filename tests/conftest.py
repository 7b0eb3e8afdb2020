"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party data and models beside the checkout; a user's clone has none."""
    folder = ROOT.parent / "shared"
    if not (folder / "models" / "stories260k").is_dir():
        pytest.skip("needs the folder of shared test data and models beside the checkout")
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The folder of a small experiment, `toy.json`; tests give their runs names of their own."""
    from toy import write_toy

    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="session")
def command_line():
    """Runs `python -m mftcoder_coba ...`, or the same under the deepspeed launcher: (processes, arguments) -> finished process."""

    def run(processes: int, *arguments: str, cwd: Path = ROOT, timeout: int = 900) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "COLUMNS": "200"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "mftcoder_coba"]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = ["deepspeed", "--num_gpus", str(processes), "--master_port", str(port), "--module", "mftcoder_coba"]
        return subprocess.run([*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)

    return run
