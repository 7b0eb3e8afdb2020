"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, ROOT, free_port, run_command


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
    """Runs `mftcoder_coba ARGUMENTS` on real processes: (processes, *arguments) -> finished process.

    `launcher`: by the deepspeed launcher, as a user does; else forked, which is faster.
    """

    def run(processes: int, *arguments: str, cwd: Path = ROOT, timeout: int = 900, launcher: bool = False) -> subprocess.CompletedProcess:
        if not launcher:
            return run_command(processes, arguments, cwd, timeout)
        command = ["deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port()), "--module", "mftcoder_coba", *arguments]
        return subprocess.run(command, cwd=cwd, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=timeout)

    return run
