"""Runs code that nobody has read, such as a model's, where it can do no harm.

In namespaces of its own (Linux, kernel 4.9 or newer, as root or as anyone else who may make user namespaces): no network; no file of the
machine but programs and libraries, read-only; all that it writes is in memory, bounded, and gone at the end; no other process to be seen or
signalled; no capability; limits on CPU seconds, memory, file size, processes, open files, output and wall clock; whatever is left running is killed.
The work is in `inside.py`, a process of its own, since a process with threads cannot enter a user namespace.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mftcoder_coba.errors import RunFailure, UserError

INSIDE = Path(__file__).with_name("inside.py")
MIB = 2**20
# What programs need of a Linux system; paths that do not exist are passed over.
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", *sorted(glob.glob("/etc/java-*"))]
SLACK_SECONDS = 20  # beyond all wall clocks, for building and clearing away


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program, all its commands and processes together where a limit does not say "each".

    Attributes:
        memory_bytes: of each process's data, and of the memory in use by all.
        disk_bytes: of all files; file_bytes: of each.
        output_bytes: kept of what is printed; the middle of more is dropped.
    """

    memory_bytes: int = 2048 * MIB
    disk_bytes: int = 256 * MIB
    file_bytes: int = 64 * MIB
    processes: int = 96  # threads count
    open_files: int = 256
    output_bytes: int = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Command:
    """Attributes:
    cpu_seconds: of each process.
    address_bytes: of each process's address space; None for those that reserve much more than they use (Java, Node, Go).
    """

    arguments: Sequence[str]
    cpu_seconds: int = 20
    wall_seconds: float = 30.0
    address_bytes: int | None = 4096 * MIB


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    status: the exit code; negative: the signal that ended it.
    reason: "wall clock", "memory" or "CPU time" where that limit ended it, else "".
    output: of both streams.
    """

    status: int
    reason: str
    output: str
    seconds: float


def run(
    commands: Sequence[Command],
    files: Mapping[str, str],
    visible: Sequence[str] = (),
    limits: Limits = Limits(),
    namespaces: bool = True,
) -> list[Outcome]:
    """Runs commands one after another in a folder that holds the files; up to the first that fails.

    Args:
        files: name -> text.
        visible: absolute paths beside those of the system that can be read inside, at their places.
        namespaces: False: limits and a throw-away folder alone; network and files are within reach.

    Raises:
        UserError: the sandbox cannot be built on this machine, or a command cannot be started in it.
        RunFailure: it was killed from outside, or failed in itself.
    """
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/scratch", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    spec = {
        "parent": os.getpid(),
        "namespaces": namespaces,
        "files": dict(files),
        "visible": [*SYSTEM, *visible],
        "environment": environment,
        "commands": [dataclasses.asdict(command) for command in commands],
    } | dataclasses.asdict(limits)
    seconds = sum(command.wall_seconds for command in commands) + SLACK_SECONDS
    arguments = [sys.executable, "-I", "-S", str(INSIDE)]
    try:
        # On time-out the process is killed, and with it, by the kernel, all that it has started.
        finished = subprocess.run(arguments, input=json.dumps(spec), capture_output=True, text=True, timeout=seconds, start_new_session=True)
    except subprocess.TimeoutExpired:
        return [Outcome(-9, "wall clock", "", seconds)]
    try:
        result = json.loads(finished.stdout)
    except json.JSONDecodeError:
        raise RunFailure(f"the sandbox ended without a result (status {finished.returncode}): {finished.stderr.strip()[-2000:]}") from None
    if "refused" in result:
        raise UserError(
            f"no sandbox can be built on this machine: {result['refused']}",
            "--allow-code-execution",
            "allow user namespaces (a container: --security-opt seccomp=unconfined --security-opt systempaths=unconfined), evaluate the code on "
            "another machine, or, where the machine itself may be thrown away, add --without-namespaces: limits only, network and files within reach",
        )
    outcomes = [Outcome(**outcome) for outcome in result["outcomes"]]
    if outcomes[-1].reason == "not started":
        fix = "install it where every user may read it, outside home folders" if not namespaces else "install it below /usr or /opt"
        raise UserError(f"a program cannot be started in the sandbox: {outcomes[-1].output}", "--allow-code-execution", fix)
    return outcomes


@functools.cache
def check_available() -> None:
    """Raises UserError where the sandbox cannot be built on this machine."""
    run([Command(["true"])], {})
