"""Memory and speed of `merge` on 5 random models of the shape of SmolLM2-135M, beside the speed at which the disk copies files.

    PYTHONPATH=. python tests/benchmarks/merging_cost.py --folder FOLDER [--rounds 5] [--methods parameter_selection linear ...]

Each merge is a process of its own. Memory: the peak of what is resident, above what it is when all is imported. Speed: bytes of the inputs and
of the result for each second of the merge with its checks, checksums and fsync; beside it `cp` of the same inputs with fsync, bytes read and
written. Merges and copies take turns; speeds are medians over the rounds. The table's second part has the same scalars in many more tensors:
all but the embedding are cut into pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

MODELS = 5
PIECES = 16
UPDATE = 1e-4
# (the options of the method, whether it is run again in each round)
SELECTION = [({"method": "parameter_selection"}, True), ({"method": "parameter_selection", "resample_rounds": 10}, True)]
BASELINES = ["norm_rescaled_average", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock"]
ALL_METHODS = [*SELECTION, *(({"method": name}, False) for name in BASELINES)]
VARIANTS = [("float32", 1, ALL_METHODS), ("bfloat16", 1, SELECTION), ("float32", PIECES, SELECTION[:1])]


def smollm2_135m() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def write_models(folder: Path, dtype: str, pieces: int) -> None:
    """`folder`/base and `folder`/model0, ...: the base with normal updates."""
    config = smollm2_135m()
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    origin = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    for number in range(MODELS + 1):
        path = folder / (f"model{number - 1}" if number else "base")
        path.mkdir(parents=True)
        config.dtype = dtype
        config.save_pretrained(path)
        tensors = {
            name: (tensor + UPDATE * torch.randn_like(tensor) if number else tensor).to(getattr(torch, dtype)) for name, tensor in origin.items()
        }
        save_file(cut(tensors, pieces), path / "model.safetensors", metadata={"format": "pt"})


def cut(tensors: dict[str, torch.Tensor], pieces: int) -> dict[str, torch.Tensor]:
    parts = {
        f"{name}.{number}": part.clone()
        for name, tensor in tensors.items()
        for number, part in enumerate(tensor.chunk(1 if "embed" in name else pieces))
    }
    return parts if pieces > 1 else tensors


def resident(what: str) -> int:
    """Bytes; VmRSS: now, VmHWM: the peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def merge_here(folder: Path, options: dict) -> None:
    """In this process; prints the bytes above those of the imports, and the seconds."""
    from mftcoder_coba.merging import adapters, build_rule, full_models, merge  # noqa: F401 imported for the baseline

    build_rule(options["method"], MODELS, {})  # imports the method's library
    before = resident("VmRSS")
    started = time.perf_counter()
    merge(str(folder / "base"), sorted(folder.glob("model*")), out=folder / "out", **options)
    print(json.dumps([resident("VmHWM") - before, time.perf_counter() - started]))


def merge_apart(folder: Path, options: dict) -> tuple[int, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--merge", json.dumps(options)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder / "out")
    return tuple(json.loads(result.stdout.splitlines()[-1]))


def copy(folder: Path) -> float:
    """Seconds to copy the inputs and have the copies on the disk."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "base", *folder.glob("model*"), folder / "copies"], check=True)
    for path in (folder / "copies").rglob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "copies")
    (folder / "copies").mkdir()
    return seconds


def measure(folder: Path, dtype: str, pieces: int, methods: list[tuple[dict, bool]], rounds: int) -> None:
    torch.manual_seed(0)
    write_models(folder, dtype, pieces)
    (folder / "copies").mkdir()
    of_one = (folder / "base" / "model.safetensors").stat().st_size
    peaks: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {"cp of the inputs": []}
    for number in range(rounds):
        seconds["cp of the inputs"].append(copy(folder))
        for options, again in methods:
            if again or not number:
                peak, taken = merge_apart(folder, options)
                name = " ".join(str(value) if key == "method" else f"{key}={value}" for key, value in options.items())
                peaks.setdefault(name, []).append(peak)
                seconds.setdefault(name, []).append(taken)
    parts = f", {pieces} pieces of each tensor but the embedding" if pieces > 1 else ""
    print(f"\n{dtype}, {MODELS} models of {of_one / 2**20:,.0f} MiB{parts}\n{'':42} peak MiB  seconds   MiB/s")
    for name, taken in seconds.items():
        moved = of_one * (MODELS + 2 if name in peaks else 2 * (MODELS + 1)) / 2**20
        peak = f"{max(peaks[name]) / 2**20:8,.0f}" if name in peaks else " " * 8
        print(f"{name:42} {peak} {statistics.median(taken):8.2f} {moved / statistics.median(taken):7,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure, with 8 GB free; what is made in it is removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["parameter_selection", *BASELINES], help="ties takes minutes: it sorts each tensor")
    parser.add_argument("--merge", help=argparse.SUPPRESS)  # this process merges
    arguments = parser.parse_args()
    if arguments.merge:
        merge_here(arguments.folder, json.loads(arguments.merge))
        return
    for dtype, pieces, methods in VARIANTS:
        work = arguments.folder / "merging_cost"
        try:
            measure(work, dtype, pieces, [each for each in methods if each[0]["method"] in arguments.methods], arguments.rounds)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
