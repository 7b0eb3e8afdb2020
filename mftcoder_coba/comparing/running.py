"""Runs as subprocesses of the ordinary `train` command, one after another."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mftcoder_coba.comparing.runs import PlannedRun
from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import read_metrics
from mftcoder_coba.reporting.records import METRICS_FILE

LINES_TOLD = 6  # of what a failed run said last
GRACE_SECONDS = 30  # for a run to end when it is told to


def is_finished(folder: Path, total_steps: int) -> bool:
    """Whether the run in `folder` has its last result: the validation after its last step.

    Raises:
        UserError: its records are broken before their last line.
    """
    return (folder / METRICS_FILE).is_file() and read_metrics(folder).validation.index_of(total_steps) is not None


def last_recorded_step(folder: Path) -> int:
    """Where a run that is not finished stands, 0 where it has no records."""
    return read_metrics(folder).last_step if (folder / METRICS_FILE).is_file() else 0


def command_of(launcher: str, config: Path) -> list[str]:
    """`train` by this Python, or by a launcher such as "deepspeed --num_gpus 2".

    Raises:
        UserError: there is no such launcher.
    """
    try:
        parts = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", f"--launcher {launcher}") from None
    if parts and shutil.which(parts[0]) is None:
        raise UserError(f"there is no program {parts[0]}", f"--launcher {launcher}", "install it, or give its path")
    start = [*parts, "--module"] if parts else [sys.executable, "-m"]
    return [*start, "mftcoder_coba", "train", "--config", str(config)]


def run_to_end(run: PlannedRun, command: list[str], log: Path) -> str:
    """Starts the run, or goes on with it, and waits for its end.

    Args:
        log: what the run prints is added here.

    Returns:
        what went wrong, or "" if the run is finished.
    """
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        before = output.tell()
        code = wait_for(command, output)
    if code == 0 and is_finished(run.folder, run.total_steps):
        return ""
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(before)
        said = [line.rstrip() for line in text if line.strip()]
    # A message of the program comes last and may have several lines; a launcher adds its own after it.
    errors = [number for number, line in enumerate(said) if line.startswith("error: ")]
    told = said[errors[-1] :][:LINES_TOLD] if errors else said[-LINES_TOLD:]
    how = f"exit code {code}" if code else f"it ended without a validation at step {run.total_steps}"
    return "\n    ".join([f"{how}; {log}", *told])


def wait_for(command: list[str], output: TextIO) -> int:
    """The exit code. If this process is told to end, the run ends with it: it would hold its folder against the next try."""
    with _terminated_as_interrupt():
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM, as batch systems send it, unwinds as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def drop_models(run: PlannedRun, keep_export: bool) -> None:
    """Frees the disk of a finished run: its checkpoints, and its best model unless that is wanted. All numbers stay."""
    for name in ("checkpoints", *(() if keep_export else ("export",))):
        shutil.rmtree(run.folder / name, ignore_errors=True)
