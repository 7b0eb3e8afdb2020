"""What a process can tell of its machine, as plain values."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import mftcoder_coba
from mftcoder_coba.config import Config
from mftcoder_coba.data.files import find_files
from mftcoder_coba.errors import UserError
from mftcoder_coba.preflight.disk import free_bytes, needed_bytes
from mftcoder_coba.training.versions import versions

PACKAGE = Path(mftcoder_coba.__file__).parent
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
GIT_SECONDS = 20


@dataclass(frozen=True)
class ProcessFacts:
    """Of one process.

    Attributes:
        host: the machine's name.
        machine: as in `NodeFacts`: tells machines of one name apart.
        device: the name of its GPU, or "cpu".
        gpus: GPUs that it sees.
    """

    rank: int
    local_rank: int
    host: str
    machine: str
    device: str
    gpus: int


@dataclass(frozen=True)
class NodeFacts:
    """Of one machine; told by its first process. What is compared is name -> value, in sections whose names people read.

    Attributes:
        values: section -> name -> value. The same on every machine of a run that may start.
        problems: what is wrong on this machine alone: no such data, no such model.
        free_disk_bytes, needed_disk_bytes: where checkpoints go.
    """

    host: str
    machine: str
    values: dict[str, dict[str, str]]
    problems: list[str] = field(default_factory=list)
    free_disk_bytes: int = 0
    needed_disk_bytes: int = 0


def process_facts(rank: int, local_rank: int, device: torch.device) -> ProcessFacts:
    on_gpu = device.type != "cpu"
    accelerator = torch.get_device_module(device)
    name = accelerator.get_device_name(device) if on_gpu else "cpu"
    return ProcessFacts(rank, local_rank, socket.gethostname(), _machine(), name, accelerator.device_count() if on_gpu else 0)


def node_facts(config: Config) -> NodeFacts:
    """Reads names and sizes of files, never their contents, but for the program's own sources."""
    data, problems = _data_files(config)
    model, model_problems = _model_files(config)
    problems += model_problems
    needed = 0
    try:
        needed = needed_bytes(config)
    except UserError as error:
        problems.append(f"{error.where}: {error.what}")
    return NodeFacts(
        host=socket.gethostname(),
        machine=_machine(),
        values={
            "program": {"sources": sources_digest(PACKAGE)} | _commit(),
            "packages": versions() | _libraries(),
            "config": {"resolved": _digest([config.model_dump_json().encode()])},
            "data": data,
            "model": model,
        },
        problems=problems,
        free_disk_bytes=free_bytes(Path(config.run.dir)),
        needed_disk_bytes=needed,
    )


def sources_digest(folder: Path) -> str:
    """Of the names and contents of all Python files below a folder: tells of changes that nobody has committed, too."""
    files = sorted(folder.rglob("*.py"))
    return _digest(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


def _digest(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()[:12]


def _machine() -> str:
    """The name may be that of several, as containers have it."""
    return f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ''}"


def _commit() -> dict[str, str]:
    """Empty where the program is no git checkout, or git is missing: the sources' digest says enough."""
    try:
        found = subprocess.run(["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": found.stdout.strip()[:12]} if found.returncode == 0 else {}


def _libraries() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"machine": platform.machine()}
    return {"machine": platform.machine(), "CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def _data_files(config: Config) -> tuple[dict[str, str], list[str]]:
    """(path -> size, what is wrong) of the data files of all tasks."""
    sizes, problems = {}, []
    for number, task in enumerate(config.data.tasks):
        for split in ("train", "valid", "test"):
            try:
                files = find_files(getattr(task, split), f"data.tasks[{number}].{split}")
            except UserError as error:
                problems.append(f"{error.where}: {error.what}")
                continue
            sizes |= {str(file): _size(file) for file in files}
    return sizes, problems


def _model_files(config: Config) -> tuple[dict[str, str], list[str]]:
    """(path -> size, what is wrong) of the base model's folder and of the adapter that training begins with. A hub id has no files to look at."""
    sizes, problems = {}, []
    folders = {"model.path": config.model.path, "adapter.initial_adapter": getattr(config.adapter, "initial_adapter", None)}
    for where, name in folders.items():
        folder = Path(name) if name else None
        if folder and folder.is_dir():
            sizes |= {str(file): _size(file) for file in sorted(folder.iterdir()) if file.is_file()}
        elif folder and folder.is_absolute():
            problems.append(f"{where}: no such folder: {folder}")
    return sizes, problems


def _size(file: Path) -> str:
    return f"{file.stat().st_size} bytes"
