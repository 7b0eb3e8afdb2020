"""Step time: CoBa over uniform weights, and training over a bare PyTorch loop on as many tokens.

    PYTHONPATH=. python tests/benchmarks/step_time.py --model MODEL_FOLDER --data FOLDER_OF_TASKS [--rows 8] [--stage 2]

One process, full parameters, float32, packed rows of 512 tokens. FOLDER_OF_TASKS/TASK/{train,valid}.jsonl are in MFTCoder's
format. All variants live in one process and take turns step by step, and what is printed are ratios of medians: a machine
that is slow for a while is slow for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mftcoder_coba.balancing import Signals
from mftcoder_coba.config import validate
from mftcoder_coba.data import load_tokenizer, prepare
from mftcoder_coba.engine import Processes, build_deepspeed_config
from mftcoder_coba.models import load_model
from mftcoder_coba.training.assembly import Run, assemble
from mftcoder_coba.training.step import train_step


def build(arguments: argparse.Namespace, processes: Processes, cache: str, balancer: str) -> Run:
    tasks = sorted(path.name for path in arguments.data.iterdir() if path.is_dir())
    tree = {
        "run": {"name": "benchmark"},
        "model": {"path": str(arguments.model), "dtype": "float32"},
        "data": {
            "tasks": [{"name": task, **{split: [str(arguments.data / task / f"{split}.jsonl")] for split in ("train", "valid")}} for task in tasks],
            "sequence_length": 512,
            "cache_dir": cache,
        },
        "balancer": {"kind": balancer},
        "training": {"max_steps": 10**6, "global_batch_rows": arguments.rows, "micro_batch_rows": min(arguments.rows, 8), "learning_rate": 1e-4},
        "deepspeed": {"zero_optimization": {"stage": arguments.stage}},
    }
    config = validate(tree, "benchmark")
    corpus = prepare(config.data, config.model.path)
    run = assemble(config, build_deepspeed_config(config, 1), corpus, load_tokenizer(config.model.path), processes, None)
    if balancer == "coba":
        run.balancer.start(run.validation.full().losses)
    return run


def ours(run: Run):
    """One whole step as the training loop makes it, with the batches' assembly and the balancer's observation."""

    def step(number: int) -> None:
        train_step(run.engine, run.balancer, run.micro_batches(number), 1e-4)
        if run.balancer.wants(number):
            rows, slots = run.stream.mini_batch(number - 1)
            run.balancer.observe(Signals(number, validation_losses=run.validation.losses(rows).losses, slots=slots))

    return step


def bare(run: Run, arguments: argparse.Namespace):
    """Forward, loss, backward, AdamW, on full rows of the same shape, with nothing packed and every token supervised."""
    model = load_model(run.config.model, "sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    micro_rows = run.config.training.micro_batch_rows
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (micro_rows, 512), generator=generator)

    def step(_: int) -> None:
        for _ in range(arguments.rows // micro_rows):
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, in micro-batches of at most 8")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    processes = Processes()
    with tempfile.TemporaryDirectory() as cache:
        runs = {kind: build(arguments, processes, cache, kind) for kind in ("uniform", "coba")}
        variants = {kind: ours(run) for kind, run in runs.items()} | {"bare loop": bare(runs["uniform"], arguments)}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(1, arguments.steps + 6):
            for name, step in variants.items():
                started = time.perf_counter()
                step(number)
                if number > 5:  # the first steps warm up
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{arguments.rows} rows of 512 tokens a step, ZeRO-{arguments.stage}, {torch.get_num_threads()} threads, {arguments.steps} steps each")
    for name, median in medians.items():
        print(f"{name:10} {1000 * median:8.1f} ms a step (median)")
    print(f"step time, coba / uniform:        {medians['coba'] / medians['uniform']:.3f}")
    print(f"throughput, uniform / bare loop:  {medians['bare loop'] / medians['uniform']:.3f}")


if __name__ == "__main__":
    main()
