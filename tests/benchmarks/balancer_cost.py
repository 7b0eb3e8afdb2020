"""What each balancer adds to a step: its time relative to uniform weights, and the work that this pays for.

    PYTHONPATH=. python tests/benchmarks/balancer_cost.py --model MODEL_FOLDER --data FOLDER_OF_TASKS [--rows 8] [--rounds 25]

All methods, and all choices of what they measure, with their defaults. Each is a training run of its own, with its loop and its
run folder; they live in one process, full parameters, float32, packed rows. They take turns of a few steps in an order that is
new in each round, and all are at the same step of the same data in a round: a machine that is slow for a while is slow for all.
With OMP_NUM_THREADS=1 the processor's time beside it leaves out what other programs took.

The work follows from the signals that a method declares. In the first step, which is not timed, the model's forward and
backward passes are counted, and the script stops if they are not what the table says.
FOLDER_OF_TASKS/TASK/{train,valid}.jsonl are in MFTCoder's format.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftcoder_coba.balancing import METHODS, signals_of
from mftcoder_coba.config import BalancerConfig, Config, validate
from mftcoder_coba.data import Corpus, load_tokenizer, prepare
from mftcoder_coba.engine import Processes, build_deepspeed_config
from mftcoder_coba.training.assembly import assemble
from mftcoder_coba.training.checkpoints import Checkpoints
from mftcoder_coba.training.run_folder import RunFolder
from mftcoder_coba.training.tracker import Tracker
from mftcoder_coba.training.trainer import Loop

# Pieces of work, each (what, of which data). The batch is the step's own; the mini-batch is the balancer's validation mini-batch.
AGAIN = ("forward", "batch", "the batch once more after the step")
BEFORE = ("forward", "mini-batch", "the mini-batch before the step")
AFTER = ("forward", "mini-batch", "the mini-batch after the step")
PRODUCTS = ("products", "batch", "gradients of the output layer from the step's hidden states")
VALIDATION_PRODUCTS = ("products", "mini-batch", "the same from the mini-batch's")
GRADIENTS = ("backward of each task", "batch", "the batch before the step, with a backward pass for each task in it")
VALIDATION_GRADIENT = ("backward", "mini-batch", "the mini-batch once more, with a backward pass")

# Signal -> the work that it takes beyond the step. What several signals of a method need is done once.
WORK: dict[str, set[tuple[str, str, str]]] = {
    "train_losses": set(),
    "train_losses_after": {AGAIN},
    "validation_losses": {AFTER},
    "validation_losses_before": {BEFORE},
    "output_gradient_norms": {PRODUCTS},
    "validation_output_gradient_norms": {AFTER, VALIDATION_PRODUCTS},
    "output_gradient_products": {PRODUCTS, AFTER, VALIDATION_PRODUCTS},
    "full_gradient_products": {GRADIENTS, AFTER, VALIDATION_GRADIENT},
}
ORDER = [BEFORE, GRADIENTS, PRODUCTS, AGAIN, AFTER, VALIDATION_PRODUCTS, VALIDATION_GRADIENT]


def variants(tasks: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to call it, the `balancer` section) of every method with every choice of what it measures."""
    for kind, method in METHODS.items():
        section: dict[str, Any] = {"kind": kind}
        if kind == "fixed":
            section["weights"] = dict.fromkeys(tasks, 1.0)
        if kind == "coba":
            for slope in ("ols", "paired"):
                yield f"coba ({slope})", {**section, "slope": slope}
        elif method.choice:
            for value in method.SIGNALS:
                yield f"{kind} ({value})", {**section, method.choice: value}
        else:
            yield kind, section


def work_of(balancer: BalancerConfig) -> list[tuple[str, str, str]]:
    wanted = set().union(*(WORK[signal] for signal in signals_of(balancer)))
    return [piece for piece in ORDER if piece in wanted]


def passes_of(work: list[tuple[str, str, str]], tasks_in_batches: list[int]) -> Counter[str]:
    """Passes through the whole model in a step, its own included. A step has a forward and a backward pass for each micro-batch.

    Args:
        tasks_in_batches: of each micro-batch, how many tasks it holds.
    """
    batches = len(tasks_in_batches)
    passes = Counter({"forward, batch": batches, "backward, batch": batches})
    for kind, data, _ in work:
        if kind == "products":
            continue
        passes[f"forward, {data}"] += batches if data == "batch" else 1
        if kind == "backward":
            passes[f"backward, {data}"] += 1
        elif kind == "backward of each task":
            passes[f"backward, {data}"] += sum(tasks_in_batches)
    return passes


@contextlib.contextmanager
def counting(module: torch.nn.Module) -> Iterator[Counter[str]]:
    """Counts forward and backward passes through the body of the model; validation is what runs in evaluation mode."""
    passes: Counter[str] = Counter()

    def count(body: torch.nn.Module, _: Any, output: Any) -> None:
        data = "batch" if body.training else "mini-batch"
        passes[f"forward, {data}"] += 1
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda _: passes.update([f"backward, {data}"]))

    handle = module.model.base_model.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def base_tree(arguments: argparse.Namespace, folder: Path, tasks: list[str]) -> dict[str, Any]:
    files = {task: {split: [str(arguments.data / task / f"{split}.jsonl")] for split in ("train", "valid")} for task in tasks}
    return {
        "model": {"path": str(arguments.model), "dtype": "float32"},
        "data": {
            "tasks": [{"name": task, **files[task]} for task in tasks],
            "sequence_length": arguments.sequence_length,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "max_steps": 10**6,
            "epochs": None,
            "global_batch_rows": arguments.rows,
            "micro_batch_rows": min(arguments.rows, 8),
            "learning_rate": 1e-4,
        },
        "validation": {"balancer_rows_per_rank": arguments.validation_rows},
        "tracking": {"log_every_steps": 10**6, "tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": arguments.stage}},
    }


def start(config: Config, corpus: Corpus, processes: Processes, initial: np.ndarray | None) -> Loop:
    """A run before its first step. `initial` [K]: the losses before training, if another run has measured them."""
    folder = RunFolder(config)
    folder.claim(processes, resuming=False)
    run = assemble(config, build_deepspeed_config(config, 1), corpus, load_tokenizer(config.model.path), processes, None)
    with contextlib.redirect_stdout(io.StringIO()):  # each run tells the same of its data
        tracker = Tracker(run, folder, ["balancer_cost"], resume_step=None)
    loop = Loop(run, folder, Checkpoints(folder.checkpoints, config.checkpoint.keep), tracker)
    if initial is None:
        loop.validate_before_training()
    else:
        run.balancer.start(initial)
    return loop


def start_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Loop]:
    tasks = sorted(path.name for path in arguments.data.iterdir() if path.is_dir())
    tree, processes, loops = base_tree(arguments, folder, tasks), Processes(), {}
    corpus = initial = None
    for name, section in sorted(variants(tasks), key=lambda variant: variant[0] != "uniform"):
        if arguments.only and section["kind"] not in {"uniform", *arguments.only}:
            continue
        config = validate({**tree, "run": {"name": f"run-{len(loops)}", "dir": str(folder)}, "balancer": section}, name)
        corpus = corpus or prepare(config.data, config.model.path)
        loops[name] = start(config, corpus, processes, initial)
        initial = loops["uniform"].initial_losses
    return loops


def first_steps(loops: dict[str, Loop]) -> None:
    """One step of each, with its passes counted. Raises RuntimeError where they are not as declared."""
    for name, loop in loops.items():
        loop.step += 1
        with counting(loop.run.engine.module) as passes:
            loop.train_and_observe()
        held = [int((batch.tokens > 0).sum()) for batch in loop.run.micro_batches(loop.step)]
        expected = passes_of(work_of(loop.config.balancer), held)
        if passes != expected:
            raise RuntimeError(f"{name}: the signals say {dict(expected)}, counted were {dict(passes)}")


def take_turns(loops: dict[str, Loop], rounds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(seconds, seconds of the processor) of a step, a mean for each method and round. A round more comes first, to warm up."""
    seconds, processor = {name: [] for name in loops}, {name: [] for name in loops}
    orders, names = np.random.default_rng(0), list(loops)
    for number in range(rounds + 1):
        for index in orders.permutation(len(names)):
            loop = loops[names[index]]
            started, used = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loop.step += 1
                loop.train_and_observe()
            if number:
                seconds[names[index]].append((time.perf_counter() - started) / steps)
                processor[names[index]].append((time.process_time() - used) / steps)
    return seconds, processor


def print_data(loops: dict[str, Loop], arguments: argparse.Namespace) -> None:
    run = loops["uniform"].run
    stream, data, batches = run.stream, run.corpus.splits["valid"], run.micro_batches(1)
    rows = [row for observation in range(stream.coverage) for row in stream.mini_batch(observation)[0]]
    tokens = sum(int(data[task].lengths[sample]) for row in rows for task, sample in row)
    first = sum(batch.total_tokens for batch in batches)
    print(f"tasks          K = {len(data)}: {', '.join(run.corpus.tasks)}")
    size = f"{arguments.rows} rows of at most {arguments.sequence_length} tokens"
    print(f"batch          {size} in {len(batches)} micro-batches; {first:,} tokens in step 1")
    print(f"mini-batch     {len(rows) / stream.coverage:.1f} rows, {tokens / stream.coverage:,.0f} tokens (means); {stream.coverage} cover the data")
    print(
        f"measured       {arguments.rounds} turns of {arguments.steps} steps; ZeRO-{arguments.stage}; threads: {torch.get_num_threads()}", flush=True
    )


def print_table(loops: dict[str, Loop], seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> None:
    """Relative times are medians, with quartiles, of the ratios to uniform in each round."""
    print(f"\n{'':28} ms a step  relative  (quartiles)     processor  pays beyond the step")
    for name, loop in loops.items():
        low, relative, high = np.quantile(np.array(seconds[name]) / np.array(seconds["uniform"]), (0.25, 0.5, 0.75))
        used = np.median(np.array(processor[name]) / np.array(processor["uniform"]))
        pays = "; ".join(text for *_, text in work_of(loop.config.balancer)) or "nothing"
        print(f"{name:28} {1000 * statistics.median(seconds[name]):9.1f} {relative:9.3f}  ({low:.3f}, {high:.3f}) {used:10.3f}  {pays}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, in micro-batches of at most 8")
    parser.add_argument("--validation-rows", type=int, default=1, help="rows of the balancer's validation mini-batch")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="these methods beside uniform")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loops = start_all(arguments, Path(folder))
        print_data(loops, arguments)
        first_steps(loops)
        times = take_turns(loops, arguments.rounds, arguments.steps)
        print_table(loops, *times)
        with contextlib.redirect_stdout(io.StringIO()):
            for loop in loops.values():
                loop.tracker.close()


if __name__ == "__main__":
    main()
