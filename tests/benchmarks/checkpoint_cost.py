"""The time of a save beside DeepSpeed's own save of the same state.

    PYTHONPATH=. python tests/benchmarks/checkpoint_cost.py --folder FOLDER [--rounds 7]
    PYTHONPATH=. deepspeed --num_gpus 2 tests/benchmarks/checkpoint_cost.py --folder FOLDER

A random Llama is trained for one step. Then the saves take turns in an order that is new in each round, each into a new folder and after
all that was written before is on the disk. Ours: writing, hashing, fsync, and the digests of all ranks collected. DeepSpeed's: `save_checkpoint`,
alone and with an fsync of its files. The time of a save is the slowest rank's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mftcoder_coba.config import validate
from mftcoder_coba.engine import Engine, Processes, build_deepspeed_config

VARIANTS = [("float32", 2), ("bfloat16", 3)]


class LanguageModel(nn.Module):
    """forward(tokens [rows, length]) -> (loss,)"""

    def __init__(self, dtype: torch.dtype, hidden: int, layers: int, vocabulary: int):
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config).to(dtype)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids=tokens, labels=tokens).loss,)


def trained(dtype: str, stage: int, processes: Processes, arguments: argparse.Namespace) -> Engine:
    """An engine after one step: its optimizer has states."""
    tree = {
        "run": {"name": "benchmark"},
        "model": {"path": "none", "dtype": dtype},
        "data": {"tasks": [{"name": "task", "train": ["none"]}]},
        "training": {"global_batch_rows": processes.world_size, "micro_batch_rows": 1, "learning_rate": 1e-4},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    config = validate(tree, "benchmark")
    torch.manual_seed(0)
    module = LanguageModel(getattr(torch, dtype), arguments.hidden, arguments.layers, arguments.vocabulary)
    engine = Engine(module, build_deepspeed_config(config, processes.world_size), config.training, processes, [])
    (loss,) = engine.forward(torch.arange(32, device=engine.device)[None])
    engine.backward(loss)
    engine.step(1e-4)
    return engine


def save(engine: Engine, folder: Path) -> None:
    engine.processes.gather_objects(engine.save(folder))


def deepspeed_save(engine: Engine, folder: Path) -> None:
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    engine._engine.save_checkpoint(str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=frozen)


def deepspeed_save_to_disk(engine: Engine, folder: Path) -> None:
    deepspeed_save(engine, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[engine.processes.rank :: engine.processes.world_size]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


SAVES: dict[str, Callable[[Engine, Path], None]] = {
    "ours": save,
    "DeepSpeed's": deepspeed_save,
    "DeepSpeed's + fsync": deepspeed_save_to_disk,
}


def seconds_of(work: Callable[[Engine, Path], None], engine: Engine, folder: Path) -> tuple[float, int]:
    """(seconds of the slowest rank, bytes written)"""
    processes = engine.processes
    if processes.is_main:
        folder.mkdir(parents=True)
        os.sync()
    processes.barrier()
    started = time.perf_counter()
    work(engine, folder)
    processes.barrier()
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    processes.barrier()
    if processes.is_main:
        shutil.rmtree(folder)
    return seconds, written


def measure(engine: Engine, folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each kind of save in each round, and the bytes that it writes. A round more comes first, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in SAVES}
    sizes: dict[str, int] = {}
    orders, names = np.random.default_rng(0), list(SAVES)
    for number in range(rounds + 1):
        for index in orders.permutation(len(names)):
            name = names[index]
            taken, sizes[name] = seconds_of(SAVES[name], engine, folder / "checkpoint")
            if number:
                seconds[name].append(taken)
    return seconds, sizes


def print_table(title: str, seconds: dict[str, list[float]], sizes: dict[str, int]) -> None:
    """Relative times are medians, with quartiles, of the ratios to DeepSpeed's save without fsync in each round."""
    print(f"\n{title}\n{'':22} seconds     MiB  relative  (quartiles)")
    for name, taken in seconds.items():
        low, relative, high = np.quantile(np.array(taken) / np.array(seconds["DeepSpeed's"]), (0.25, 0.5, 0.75))
        print(f"{name:22} {np.median(taken):7.3f} {sizes[name] / 2**20:7.0f} {relative:9.3f}  ({low:.3f}, {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; nothing stays in it")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it
    arguments = parser.parse_args()
    processes = Processes()
    for dtype, stage in VARIANTS:
        engine = trained(dtype, stage, processes, arguments)
        parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
        seconds, sizes = measure(engine, arguments.folder, arguments.rounds)
        if processes.is_main:
            print_table(f"{parameters / 1e6:.0f} M parameters, {dtype}, ZeRO-{stage}, {processes.world_size} ranks", seconds, sizes)
        engine.close()
    processes.close()


if __name__ == "__main__":
    main()
