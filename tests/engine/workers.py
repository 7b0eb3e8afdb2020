"""What the ranks of the engine's tests do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_models import tiny_model

from mftcoder_coba.balancing import create
from mftcoder_coba.config import Config, validate
from mftcoder_coba.data import TaskData, collate
from mftcoder_coba.engine import Engine, Processes, build_deepspeed_config
from mftcoder_coba.models import CgcLoraModel, adapter_names, add_adapter
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.training.step import train_step

TASKS = ("a", "b", "c")
ROWS = 8


def configured(stage: int, micro_batch_rows: int, **changes) -> Config:
    tree = {
        "run": {"name": "test"},
        "model": {"path": "none", "dtype": changes.get("dtype", "float32"), "gradient_checkpointing": changes.get("gradient_checkpointing", False)},
        "adapter": changes.get("adapter"),
        "data": {"tasks": [{"name": name, "train": ["none"]} for name in TASKS]},
        "balancer": {"kind": "fixed", "weights": {"a": 1, "b": 2, "c": 5}},
        "training": {
            "global_batch_rows": ROWS,
            "micro_batch_rows": micro_batch_rows,
            "learning_rate": 1e-3,
            "gradient_clipping": changes.get("gradient_clipping", 0.0),
            "reduction": changes.get("reduction", "token"),
        },
        # Threshold 0: ZeRO-3 partitions even the smallest parameter of the tiny model.
        "deepspeed": {"zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}},
    }
    return validate(tree, "test")


def build(config: Config, processes: Processes) -> Engine:
    torch.manual_seed(0)
    model = tiny_model("llama_tied", dtype=getattr(torch, config.model.dtype))
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = MultiTaskObjective(_adapted(model, config), len(TASKS))
    external = [(objective.output_loss, objective.output_loss.external_parameters)]
    return Engine(objective, build_deepspeed_config(config, processes.world_size), config.training, processes, external)


def _adapted(model: nn.Module, config: Config) -> nn.Module:
    """Experts are drawn, too: what starts at zero would hide what they do."""
    model = add_adapter(model, config.adapter, TASKS)
    if isinstance(model, CgcLoraModel):
        for name in model.adapter_names():
            torch.nn.init.normal_(model.get_parameter(name), std=1.0 if name.startswith("gates.") else 0.1)
    return model


def data() -> tuple[list[TaskData], list[list[tuple[int, int]]]]:
    """Rows of one to three documents with very uneven numbers of supervised tokens; task c is in the sixth row only."""
    generator = np.random.default_rng(0)
    samples: list[list] = [[], [], []]
    rows = []
    for number in range(ROWS):
        row = []
        for task in [2] if number == 5 else [[0], [1, 0], [0, 1, 0], [1]][number % 4]:
            length = int(generator.integers(4, 14))
            mask = np.zeros(length, bool)
            mask[int(generator.integers(1, length)) :] = True
            row.append((task, len(samples[task])))
            samples[task].append((generator.integers(0, 64, length).astype(np.int32), mask))
        rows.append(row)
    return [TaskData.from_samples(of_task) for of_task in samples], rows


def micro_batches(config: Config, engine: Engine) -> list:
    task_data, rows = data()
    size, processes = config.training.micro_batch_rows, engine.processes
    starts = [(index * processes.world_size + processes.rank) * size for index in range(engine.accumulation_steps)]
    return [collate(rows[start : start + size], task_data, len(TASKS), 0, config.training.reduction) for start in starts]


def gradients(micro_batch_rows: int, variants: list[dict], out: str) -> None:
    """Saves, from rank 0, each variant's gradient of one step as the optimizer would see it, and the parameters after it."""
    from deepspeed.utils import safe_get_full_grad

    processes, results = Processes(), []
    for variant in variants:
        config = configured(micro_batch_rows=micro_batch_rows, **variant)
        engine = build(config, processes)
        captured = {}
        original = engine.step

        def step(learning_rate, engine=engine, captured=captured, original=original):
            for name, parameter in engine.module.model.named_parameters():
                if parameter.requires_grad:
                    gradient = parameter.grad if engine.zero_stage == 0 else safe_get_full_grad(parameter)
                    captured[name] = gradient.float().clone()
            return original(learning_rate)

        engine.step = step
        outcome = train_step(engine, create(config.balancer, TASKS, 1), micro_batches(config, engine), 1e-3)
        results.append(
            {
                "gradients": captured,
                "parameters": engine.gather_state(engine.module.model, adapter_names(engine.module.model)),
                "loss": outcome.loss,
                "losses": outcome.losses.tolist(),
                "tokens": outcome.tokens.tolist(),
                "grad_norm": outcome.grad_norm,
            }
        )
        engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()


def bad_numbers(variants: list[dict], out: str) -> None:
    """A step with a NaN on the last rank only, between two good ones."""
    processes, results = Processes(), []
    for variant in variants:
        config = configured(micro_batch_rows=2, **variant)
        engine, balancer = build(config, processes), create(configured(0, 2).balancer, TASKS, 1)
        model = engine.module.model
        good = micro_batches(config, engine)
        bad = micro_batches(config, engine)
        if processes.rank == processes.world_size - 1:
            bad[0].loss_weights.mul_(torch.nan)
        first = train_step(engine, balancer, good, 1e-3)
        before = engine.gather_state(model)
        second = train_step(engine, balancer, bad, 1e-3)
        between = engine.gather_state(model)
        third = train_step(engine, balancer, good, 1e-3)
        after = engine.gather_state(model)
        results.append(
            {
                "skipped": [first.skipped, second.skipped, third.skipped],
                "unchanged": all(torch.equal(before[name], between[name]) for name in before),
                "then_changed": any(not torch.equal(between[name], after[name]) for name in before),
                "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()),
            }
        )
        engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()


def disturbed_weights(rank: int, out: str) -> None:
    """Three steps; in the third one rank's weights are off by one bit."""
    processes = Processes()
    config = configured(2, 2)
    engine, balancer = build(config, processes), create(config.balancer, TASKS, 1)
    batches = micro_batches(config, engine)
    for _ in range(2):
        train_step(engine, balancer, batches, 1e-3)
    before = engine.gather_state(engine.module.model)
    if processes.rank == rank:
        original = balancer.weights
        balancer.weights = lambda denominators: np.nextafter(original(denominators), 1.0)
    try:
        train_step(engine, balancer, batches, 1e-3)
    finally:
        after = engine.gather_state(engine.module.model)
        if processes.is_main:
            torch.save(all(torch.equal(before[name], after[name]) for name in before), out)
