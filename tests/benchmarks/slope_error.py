"""Paired against plain slopes: which of the two is nearer to the slope of the whole validation set, and by how much?

    PYTHONPATH=. python tests/benchmarks/slope_error.py --model MODEL_FOLDER --data FOLDER_OF_TASKS [--steps 150] [--save FILE.npz]
    PYTHONPATH=. python tests/benchmarks/slope_error.py --config EXPERIMENT.json
    PYTHONPATH=. python tests/benchmarks/slope_error.py --load FILE.npz

One training run with uniform weights, in one process, and after each of its steps the loss of every validation sample. From
these the balancer's mini-batches are put together as a run would have measured them, for any number of samples per task, and
given to CoBa with plain and with paired slopes. The reference is CoBa with plain slopes that sees the losses of the whole set
at every step, over the same window: its slope is least squares on the full-set ratio. Only the steps after the warm-up count,
or, with `--after window`, only those with a full window. Each replay cuts the set into mini-batches in another seeded order;
the first has the run's own seed.

FOLDER_OF_TASKS/TASK/{train,valid}.jsonl are in MFTCoder's format. With --model: full parameters, float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mftcoder_coba.balancing import Balancer, Signals, create
from mftcoder_coba.config import CobaConfig, Config, UniformConfig, load_config, validate
from mftcoder_coba.data import BalancerStream, Batch, collate, load_tokenizer, prepare, validation_rows
from mftcoder_coba.engine import Processes, build_deepspeed_config
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.training.assembly import Run, assemble
from mftcoder_coba.training.learning_rate import learning_rate
from mftcoder_coba.training.step import train_step


@dataclass(frozen=True)
class Recording:
    """Validation losses of single samples over a run.

    Attributes:
        tasks: [K] names. task, sample: [samples] which sample of which task a column is.
        lengths, tokens: [samples] all tokens of it, and the supervised ones.
        losses: [steps + 1, samples] float64, mean over the sample's supervised tokens; row 0 is before training.
        sequence_length, seed: of the run.
    """

    tasks: np.ndarray
    task: np.ndarray
    sample: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    sequence_length: np.ndarray
    seed: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.losses) - 1

    def task_losses(self, step: int, columns: np.ndarray) -> np.ndarray:
        """[K] mean over the tokens of each task's samples among `columns`, after `step`."""
        task, tokens = self.task[columns], self.tokens[columns]
        return np.bincount(task, tokens * self.losses[step, columns], len(self.tasks)) / np.bincount(task, tokens, len(self.tasks))

    def full_losses(self) -> np.ndarray:
        """[steps + 1, K] of all samples."""
        return np.array([self.task_losses(step, np.arange(len(self.task))) for step in range(self.steps + 1)])


class EverySample:
    """The loss of each validation sample. To an objective around the run's own model, each sample is a task.

    A row holds one sample, the longest first: without documents that must be kept apart, rows are cheap.

    Args:
        count: of each task's samples, the first ones.
    """

    def __init__(self, run: Run, count: int):
        data, length, at_once = run.corpus.splits["valid"], run.config.data.sequence_length, run.config.training.micro_batch_rows
        rows = validation_rows([task.lengths[:count] for task in data], length, "none")
        self.columns = np.array([row[0] for row in rows])  # [samples, 2]: task, sample
        self.lengths = np.array([data[task].lengths[sample] for task, sample in self.columns])
        self.tokens = np.array([data[task].supervised[sample] for task, sample in self.columns])
        parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        self.batches: list[Batch] = [
            collate(part, data, len(data), run.corpus.pad_token_id, "token", max_length=length, isolate=False) for part in parts
        ]
        self.engine, self.objective = run.engine, MultiTaskObjective(run.engine.module.model, len(rows))

    def losses(self) -> np.ndarray:
        """[samples]"""
        sums, start = 0.0, 0
        with self.engine.evaluating():
            for batch in self.batches:
                numbers = torch.arange(start, start + len(batch.labels))[:, None].expand_as(batch.labels)
                tensors = (batch.input_ids, batch.position_ids, batch.labels, numbers.contiguous(), batch.loss_weights)
                sums = sums + self.objective(*(tensor.to(self.engine.device) for tensor in tensors), None)[1]
                start += len(batch.labels)
        return sums.cpu().numpy() / self.tokens


def record(config: Config, count: int) -> Recording:
    """Trains as `config` says, but with uniform weights and in one process, and measures `count` validation samples of each task."""
    corpus = prepare(config.data, config.model.path, config.model.trust_remote_code)
    without = [name for name, task in zip(corpus.tasks, corpus.splits["valid"], strict=True) if not len(task)]
    if without:
        raise SystemExit(f"no validation samples for {', '.join(without)}")
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    run = assemble(config, build_deepspeed_config(config, 1), corpus, tokenizer, Processes(), None)
    every, training, total = EverySample(run, count), config.training, run.plan.total_steps
    losses, started = [every.losses()], time.perf_counter()
    for step in range(1, total + 1):
        torch.manual_seed(config.run.seed + step)  # of dropout
        outcome = train_step(run.engine, run.balancer, run.micro_batches(step), learning_rate(training, step, run.plan.warmup_steps, total))
        if outcome.skipped:
            raise SystemExit(f"step {step}: loss or gradient were not finite; lower the learning rate")
        losses.append(every.losses())
        if step % 50 == 0 or step == total:
            print(f"step {step} of {total}, {time.perf_counter() - started:.0f} s", flush=True)
    task, sample = every.columns.T
    fixed = {"sequence_length": np.array(config.data.sequence_length), "seed": np.array(config.run.seed)}
    recording = Recording(np.array(corpus.tasks), task, sample, every.lengths, every.tokens, np.array(losses), **fixed)
    # The run's own validation, of the same samples one to a row, must agree.
    expected = run.validation.losses([[(int(task), int(sample))] for task, sample in every.columns]).losses
    np.testing.assert_allclose(recording.full_losses()[-1], expected, rtol=1e-5)
    return recording


def build_config(arguments: argparse.Namespace, cache: str) -> Config:
    if arguments.config:
        config = load_config(arguments.config)
    else:
        tasks = sorted(path.name for path in arguments.data.iterdir() if path.is_dir())
        files = {task: {split: [str(arguments.data / task / f"{split}.jsonl")] for split in ("train", "valid")} for task in tasks}
        rates = {"learning_rate": arguments.learning_rate, "schedule": arguments.schedule}
        tree = {
            "run": {"name": "slope-error", "seed": arguments.seed},
            "model": {"path": str(arguments.model), "dtype": "float32"},
            "data": {
                "tasks": [{"name": task, **files[task]} for task in tasks],
                "sequence_length": arguments.sequence_length,
                "cache_dir": cache,
            },
            "training": {"epochs": None, "max_steps": arguments.steps, "global_batch_rows": arguments.rows, "micro_batch_rows": 8, **rates},
        }
        config = validate(tree, "slope_error")
    # In one process the stage changes nothing, and below 3 the model is whole.
    return config.model_copy(update={"balancer": UniformConfig(kind="uniform"), "deepspeed": {"zero_optimization": {"stage": 2}}})


@dataclass(frozen=True)
class Replay:
    """What CoBa made of one cut of the validation set, after each step that counts: slopes and weights [steps, K] by "plain",
    "paired" and "full"; M = W and N; the first step that counts."""

    slopes: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    coverage: int
    window: int
    first: int


def replay(recording: Recording, full: np.ndarray, samples: int, seed: int, after: str) -> Replay | None:
    """Mini-batches of `samples` of each task, in the order of `seed`. `after`: see the option. None where a mini-batch is the
    whole set, or no step counts."""
    tasks = recording.tasks.tolist()
    column = {key: index for index, key in enumerate(zip(recording.task.tolist(), recording.sample.tolist(), strict=True))}
    lengths = [np.array([recording.lengths[column[task, number]] for number in range((recording.task == task).sum())]) for task in range(len(tasks))]
    stream = BalancerStream(lengths, seed, int(recording.sequence_length), "none", samples * len(tasks))
    window, first = 2 * stream.coverage, stream.coverage + 1 if after == "warmup" else 2 * stream.coverage
    if stream.coverage == 1 or first > recording.steps:
        return None
    balancers: dict[str, Balancer] = {
        name: create(CobaConfig(kind="coba", slope="paired" if name == "paired" else "ols"), tasks, stream.coverage)
        for name in ("plain", "paired", "full")
    }
    slopes, weights = {name: [] for name in balancers}, {name: [] for name in balancers}
    for balancer in balancers.values():
        balancer.start(full[0])
    for step in range(1, recording.steps + 1):
        rows, slots = stream.mini_batch(step - 1)
        losses = recording.task_losses(step, np.array([column[document] for row in rows for document in row]))
        for name, balancer in balancers.items():
            balancer.observe(Signals(step, validation_losses=full[step] if name == "full" else losses, slots=slots))
            slopes[name].append([shown["slope"] for shown in balancer.record()["tasks"].values()])
            weights[name].append(balancer.weights(np.ones(len(tasks))))
    cut = [{name: np.array(values)[first - 1 :] for name, values in of.items()} for of in (slopes, weights)]
    return Replay(*cut, stream.coverage, window, first)


def root_mean_square(values: Any, axis: Any = None) -> Any:
    return np.sqrt(np.mean(np.square(values), axis))


def print_run(recording: Recording, full: np.ndarray) -> None:
    print(f"\n{'task':16} samples  supervised  loss before  lowest ratio  at step  last ratio")
    for index, name in enumerate(recording.tasks):
        ratio, of_task = full[:, index] / full[0, index], recording.task == index
        tail = f"{ratio.min():12.4f}  {ratio.argmin():7}  {ratio[-1]:10.4f}"
        print(f"{name:16} {of_task.sum():7}  {recording.tokens[of_task].sum():10}  {full[0, index]:11.4f}  {tail}")


def print_tables(recording: Recording, full: np.ndarray, samples: list[int], replays: int, after: str) -> None:
    found = {b: [replay(recording, full, b, int(recording.seed) + number, after) for number in range(replays)] for b in samples}
    for b in [b for b in samples if None in found[b]]:
        print(f"\nleft out: with {b} samples per task a mini-batch is the whole set, or no step of {recording.steps} counts")
        del found[b]
    print("\nslopes, in 1e-6 of the ratio per step (RMS: root mean square; RMSE: of the estimate less the true slope)")
    print(f"{'task':16}  b    M    N   steps    RMS true  RMSE plain  RMSE paired  paired/plain")
    for index, name in enumerate(recording.tasks):
        for b, of_b in found.items():
            true = root_mean_square([one.slopes["full"][:, index] for one in of_b])
            plain, paired = (root_mean_square([(one.slopes[kind] - one.slopes["full"])[:, index] for one in of_b]) for kind in ("plain", "paired"))
            head = f"{name:16} {b:2} {of_b[0].coverage:4} {of_b[0].window:4}  {of_b[0].first:3}-{recording.steps:<4}"
            print(f"{head} {1e6 * true:9.1f} {1e6 * plain:11.1f} {1e6 * paired:12.1f} {paired / plain:13.3f}")
    print("\nCoBa's weights: mean distance from those of the full-set losses (over tasks and steps), and theirs from 1/K")
    print(" b    plain   paired   paired/plain   full-set weights from 1/K")
    for b, of_b in found.items():
        plain, paired = (np.mean([np.abs(one.weights[kind] - one.weights["full"]) for one in of_b]) for kind in ("plain", "paired"))
        scale = np.mean([np.abs(one.weights["full"] - 1 / len(recording.tasks)) for one in of_b])
        print(f"{b:2} {plain:8.4f} {paired:8.4f} {paired / plain:14.3f} {scale:27.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="an experiment, instead of --model, --data and what belongs to them")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, in micro-batches of 8")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="cosine", choices=["cosine", "linear", "constant"])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--validation-samples", type=int, default=32, help="of each task, the first ones; they are the whole set here")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8], help="b: samples per task and mini-batch")
    parser.add_argument("--replays", type=int, default=20, help="orders of the validation set")
    parser.add_argument("--after", default="warmup", choices=["warmup", "window"], help="count the steps after the warm-up, or with a full window")
    parser.add_argument("--save", type=Path, help="keep the recording in this .npz file")
    parser.add_argument("--load", type=Path, help="a recording, instead of a run")
    arguments = parser.parse_args()
    if not (arguments.load or arguments.config or (arguments.model and arguments.data)):
        parser.error("give --model and --data, or --config, or --load")
    if arguments.load:
        with np.load(arguments.load) as stored:
            recording = Recording(**stored)
    else:
        with tempfile.TemporaryDirectory() as cache:
            recording = record(build_config(arguments, cache), arguments.validation_samples)
        if arguments.save:
            np.savez(arguments.save, **asdict(recording))
    full = recording.full_losses()
    print_run(recording, full)
    print_tables(recording, full, arguments.samples, arguments.replays, arguments.after)


if __name__ == "__main__":
    main()
