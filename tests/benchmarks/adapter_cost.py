"""Step time and memory of adapters with experts, relative to a plain LoRA of the same total rank.

    PYTHONPATH=. python tests/benchmarks/adapter_cost.py --model MODEL_FOLDER --data FOLDER_OF_TASKS [FOLDER ...] [--rank 48] [--rows 8]

One process, float32, packed rows, uniform weights. Each folder FOLDER/TASK/{train,valid}.jsonl, in MFTCoder's format, is one cluster.
The total rank is that of a token's pass through all experts of all clusters. All variants live in one process and take turns step by
step in an order that is new in each round; what is printed are medians, with quartiles, of the ratios within a round: a machine that
is slow for a while is slow for all. With OMP_NUM_THREADS=1 the processor's time beside it leaves out what other programs took.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mftcoder_coba.config import validate
from mftcoder_coba.data import load_tokenizer, prepare
from mftcoder_coba.engine import Processes, build_deepspeed_config
from mftcoder_coba.training.assembly import Run, assemble
from mftcoder_coba.training.step import train_step


def tasks_of(folders: list[Path]) -> dict[str, dict[str, Path]]:
    """Cluster -> task -> folder."""
    return {folder.name: {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} for folder in folders}


def adapters(clusters: dict[str, dict[str, Path]], rank: int) -> dict[str, dict[str, Any]]:
    share = rank // len(clusters)
    named = {cluster: list(tasks) for cluster, tasks in clusters.items()}
    return {
        "lora": {"kind": "lora", "rank": rank},
        "moe_lora": {"kind": "moe_lora", "rank": rank, "experts": 8},
        "cgc_lora": {"kind": "cgc_lora", "rank": share, "clusters": named, "common_experts": 2, "task_experts": 2},
    }


def build(arguments: argparse.Namespace, processes: Processes, cache: str, adapter: dict[str, Any]) -> Run:
    folders = {task: path for tasks in tasks_of(arguments.data).values() for task, path in tasks.items()}
    tree = {
        "run": {"name": "benchmark"},
        "model": {"path": str(arguments.model), "dtype": "float32", "gradient_checkpointing": arguments.checkpointing},
        "adapter": adapter | {"dropout": arguments.dropout},
        "data": {
            "tasks": [{"name": name, **{split: [str(path / f"{split}.jsonl")] for split in ("train", "valid")}} for name, path in folders.items()],
            "sequence_length": arguments.length,
            "cache_dir": cache,
        },
        "balancer": {"kind": "uniform"},
        "training": {
            "max_steps": 10**6,
            "global_batch_rows": arguments.rows,
            "micro_batch_rows": min(arguments.rows, arguments.micro_rows),
            "learning_rate": 1e-4,
        },
        "deepspeed": {"zero_optimization": {"stage": arguments.stage}},
    }
    config = validate(tree, "benchmark")
    corpus = prepare(config.data, config.model.path)
    return assemble(config, build_deepspeed_config(config, 1), corpus, load_tokenizer(config.model.path), processes, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, nargs="+")
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro-rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    processes, shuffle = Processes(), random.Random(0)
    seconds: dict[str, list[tuple[float, float]]] = {}  # by the clock, of the processor
    with tempfile.TemporaryDirectory() as cache:
        sections = adapters(tasks_of(arguments.data), arguments.rank)
        runs = {name: build(arguments, processes, cache, adapter) for name, adapter in sections.items()}
        for number in range(1, arguments.rounds + 3):
            for name in shuffle.sample(list(runs), len(runs)):
                batches = runs[name].micro_batches(number)
                started = time.perf_counter(), time.process_time()
                train_step(runs[name].engine, runs[name].balancer, batches, 1e-4)
                if number > 2:  # the first steps warm up
                    seconds.setdefault(name, []).append((time.perf_counter() - started[0], time.process_time() - started[1]))
    print(
        f"{arguments.rows} rows of {arguments.length} tokens a step, ZeRO-{arguments.stage}, "
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds"
    )
    for name, run in runs.items():
        gates = sum(p.numel() for n, p in run.engine.module.named_parameters() if ".gates." in n)
        clock, processor = (over_lora([pair[kind] for pair in seconds[name]], [pair[kind] for pair in seconds["lora"]]) for kind in (0, 1))
        print(
            f"{name:9} {statistics.median(pair[0] for pair in seconds[name]):7.3f} s a step; over LoRA's {clock}, of the processor {processor}; "
            f"{run.parameters['trainable'] - gates:,} parameters of experts, {gates:,} of gates"
        )


def over_lora(ours: list[float], theirs: list[float]) -> str:
    low, median, high = statistics.quantiles([one / lora for one, lora in zip(ours, theirs, strict=True)], n=4)
    return f"{median:.3f} ({low:.3f}, {high:.3f})"


if __name__ == "__main__":
    main()
