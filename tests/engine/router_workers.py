"""What the ranks of `test_experts_on_ranks` do."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import workers
from tiny_models import tiny_model

from mftcoder_coba.balancing import create
from mftcoder_coba.engine import Engine, Processes, build_deepspeed_config
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.training.step import losses_of, train_step


def step(architecture: str, stages: list[int], coefficient: float, out: str) -> None:
    """Saves, from rank 0, what a step on micro-batches of two rows did under each ZeRO stage."""
    processes, results = Processes(), []
    for stage in stages:
        config = workers.configured(stage, 2)
        objective = MultiTaskObjective(tiny_model(architecture), len(workers.TASKS), router_loss_coefficient=coefficient)
        external = [(objective.output_loss, objective.output_loss.external_parameters)]
        engine = Engine(objective, build_deepspeed_config(config, processes.world_size), config.training, processes, external)
        batches = workers.micro_batches(config, engine)
        with engine.evaluating():
            before = losses_of(engine, batches).losses.tolist()
        outcome = train_step(engine, create(config.balancer, workers.TASKS, 1), batches, 1e-3)
        parameters = engine.gather_state(engine.module.model)
        results.append({"outcome": outcome, "before": before, "parameters": parameters})
        engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()
