"""What the ranks of the gradient signals' tests do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workers import TASKS, build, configured, data, micro_batches

from mftcoder_coba.balancing import Signals, create
from mftcoder_coba.data import Row
from mftcoder_coba.engine import Engine, Processes
from mftcoder_coba.training.gradients import gradients_of
from mftcoder_coba.training.observation import Observer
from mftcoder_coba.training.step import StepOutcome, train_step
from mftcoder_coba.training.validation import Validation

STEPS = 2
FULL = "full_gradient_products"
OUTPUT = frozenset({"output_gradient_norms", "validation_output_gradient_norms", "output_gradient_products"})


class Stream:
    """Five validation rows: on two ranks with two rows a pass, the last pass of the second rank is empty."""

    def mini_batch(self, observation: int) -> tuple[list[Row], np.ndarray]:
        rows = data()[1]
        return [rows[5], *rows[:4]], np.full(len(TASKS), observation)


class Steps:
    """Steps of one engine, each with dropout of its own, measured or not."""

    def __init__(self, processes: Processes, variant: dict, wanted: frozenset[str]):
        self.config = configured(micro_batch_rows=2, **variant)
        self.engine = build(self.config, processes)
        self.balancer = create(self.config.balancer, TASKS, 1)
        self.batches = micro_batches(self.config, self.engine)
        task_data, _ = data()
        validation = Validation(self.engine, task_data, sequence_length=64, packing="best_fit", rows_per_batch=2, pad_token_id=0)
        self.observer = Observer(self.engine, wanted, validation, Stream(), update_interval=1, seed_dropout=self.seed)
        self.number = 0

    def seed(self) -> None:
        torch.manual_seed(1000 * self.number + self.engine.processes.rank)

    def train(self) -> StepOutcome:
        self.seed()
        return train_step(self.engine, self.balancer, self.batches, 1e-3)

    def measured(self) -> Signals:
        self.number += 1
        return self.observer.around(self.number, self.batches, self.train)[0]

    def unmeasured(self) -> None:
        self.number += 1
        self.train()

    def parameters(self) -> dict[str, torch.Tensor]:
        return self.engine.gather_state(self.engine.module.model)


def plain(signals: Signals) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in vars(signals).items() if name != "step" and values is not None}


def same_on_all_ranks(processes: Processes, signals: Signals) -> bool:
    values = np.concatenate([np.nan_to_num(np.array(row, float), nan=-1.0) for row in plain(signals).values()])
    gathered = torch.zeros(processes.world_size, len(values), dtype=torch.float64)
    gathered[processes.rank] = torch.from_numpy(values)
    gathered = processes.all_reduce_sum(gathered)
    return bool((gathered == gathered[0]).all())


def whole_gradient(engine: Engine, batches: list, factors: torch.Tensor) -> torch.Tensor:
    """[n] of sum_k factors[k] S_k, on every rank."""
    part = gradients_of(engine, batches, factors[None])[0]
    whole = torch.zeros(engine.processes.world_size, len(part))
    whole[engine.processes.rank] = part
    return engine.processes.all_reduce_sum(whole).flatten()


def step_gradient(steps: Steps) -> torch.Tensor:
    """[n] of one step, as the optimizer sees it."""
    from deepspeed.utils import safe_get_full_grad

    found = []
    original = steps.engine.step

    def step(learning_rate):
        trained = [parameter for parameter in steps.engine.module.parameters() if parameter.requires_grad]
        found.extend((p.grad if steps.engine.zero_stage == 0 else safe_get_full_grad(p)).float().flatten() for p in trained)
        return original(learning_rate)

    steps.engine.step = step
    steps.unmeasured()
    steps.engine.step = original
    return torch.cat(found)


def observe(variants: list[dict], out: str) -> None:
    """Saves from rank 0, for each variant, two measured steps, a third with a NaN on one rank, and what to compare with."""
    processes, results = Processes(), []
    for variant in variants:
        whole = variant["stage"] < 3
        steps = Steps(processes, variant, OUTPUT | {FULL} if whole else OUTPUT)
        unmeasured = Steps(processes, variant, frozenset())
        passes = []
        steps.engine.module.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        states, signals = [steps.parameters()], []
        for _ in range(STEPS):
            signals.append(steps.measured())
            unmeasured.unmeasured()
            states.append(steps.parameters())
        forwards = len(passes)
        without = unmeasured.parameters()
        result = {
            "signals": [plain(one) for one in signals],
            "states": states,
            "same_on_all_ranks": all(same_on_all_ranks(processes, one) for one in signals),
            "unchanged_by_measuring": all(torch.equal(states[-1][name], without[name]) for name in without),
            "forward_passes": forwards,
        }
        if whole:
            # The step's gradient is that of sum_k (w_k / N_k) S_k, with the same masks.
            unmeasured.number += 1
            unmeasured.seed()
            count = processes.all_reduce_sum(torch.from_numpy(sum(b.denominators for b in unmeasured.batches).copy()))
            weights = torch.from_numpy(unmeasured.balancer.weights(count.numpy()))
            result["gradient"] = whole_gradient(unmeasured.engine, unmeasured.batches, weights / count)
            unmeasured.number -= 1
            result["step_gradient"] = step_gradient(unmeasured)
        if processes.rank == processes.world_size - 1:
            steps.batches[0].loss_weights.mul_(torch.nan)
        bad = steps.measured()
        result |= {"bad": plain(bad), "bad_same_on_all_ranks": same_on_all_ranks(processes, bad)}
        results.append(result)
        steps.engine.close()
        unmeasured.engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()
