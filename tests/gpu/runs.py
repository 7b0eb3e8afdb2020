"""Checks that start processes of their own: several GPUs, and training with a resume."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from checks import CheckFailed, Skipped, expect
from toy import write_toy

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # that a check's processes may take


def started(command: list[str], device: torch.device, cwd: Path = ROOT) -> str:
    """Runs Python with these arguments; its output.

    Raises:
        CheckFailed: with the first error; all of the output is shown before.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), **({"DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {})}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of a process group of the caller's
        environment.pop(name, None)
    try:
        result = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"not done after {SECONDS} seconds") from None
    if result.returncode:
        print(result.stdout, file=sys.stderr, flush=True)
        # The launcher's own traceback comes after that of the rank.
        causes = re.findall(r"^(?:[\w.]*(?:Error|Exception|Failure)\b|error:).*", result.stdout, re.MULTILINE)
        raise CheckFailed(f"ended with {result.returncode}: {causes[0] if causes else 'see above'}")
    return result.stdout


def on_ranks(count: int, device: torch.device, function: str, *arguments) -> str:
    """Calls a function of `rank.py` on each of `count` ranks."""
    if device.type != "cpu" and torch.cuda.device_count() < count:
        raise Skipped(f"needs {count} GPUs, there are {torch.cuda.device_count()}")
    program = [str(Path(__file__).with_name("rank.py")), function, json.dumps(arguments)]
    return started(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *program], device)


def all_reduce(device: torch.device) -> str:
    """The sum over all GPUs of this machine is right, and how fast it is."""
    count = max(2, torch.cuda.device_count())
    (line,) = [line for line in on_ranks(count, device, "bandwidth", 1.0).splitlines() if line.startswith("bandwidth ")]
    return f"{count} ranks, {float(line.split()[1]):.1f} GB/s"


def two_ranks_are_one(device: torch.device) -> str:
    """Gradients and parameters of a step under ZeRO-0 to 3 on two ranks, against one rank that has the whole batch."""
    variants = [{"stage": stage} for stage in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{count}.pt") for count in (1, 2)]
        on_ranks(2, device, "gradients", 2, variants, files[1])  # is skipped before anything runs, with one GPU
        on_ranks(1, device, "gradients", 8, variants[:1], files[0])
        (alone,), both = (torch.load(file, weights_only=False, map_location="cpu") for file in files)
    largest = 0.0
    for found in both:
        for kind in ("gradients", "parameters"):
            for name, values in alone[kind].items():
                largest = max(largest, ((found[kind][name] - values).norm() / values.norm().clamp_min(1e-12)).item())
    return expect(largest, 1e-3, "ZeRO-0 to 3, gradients and parameters")


def training_resumes(device: torch.device) -> str:
    """A small run goes down in loss; from its checkpoint in the middle it goes the same way again."""
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder)
        write_toy(toy)
        command = ["-m", "mftcoder_coba", "train", "--config", str(toy / "toy.json")]
        started(command, device, toy)
        first = _losses(toy)
        started([*command, "--set", f"checkpoint.resume={toy}/runs/toy/checkpoints/step-000006"], device, toy)
        second = _losses(toy)
    if sorted(first) != list(range(1, 13)) or first.keys() != second.keys():
        raise CheckFailed(f"steps {sorted(first)} and {sorted(second)}, expected 1 to 12 twice")
    if not all(map(math.isfinite, first.values())) or not first[12] < first[1]:
        raise CheckFailed(f"the loss went from {first[1]:.3f} to {first[12]:.3f}")
    largest = max(abs(first[step] - second[step]) / first[step] for step in first)
    return f"loss {first[1]:.2f} to {first[12]:.2f}; " + expect(largest, 1e-4, "after the resume")


def _losses(toy: Path) -> dict[int, float]:
    lines = (toy / "runs" / "toy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"}
