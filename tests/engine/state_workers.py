"""What the ranks of the tests of saved states do."""

from __future__ import annotations

import hashlib
import resource
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from workers import TASKS, build, configured, micro_batches

from mftcoder_coba.balancing import create
from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError
from mftcoder_coba.training.step import train_step

LEARNING_RATE = 1e-3
bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it takes seconds
States = dict[str, list[torch.Tensor]]


class Run:
    """An engine with what it takes to step it. variant: of `configured`; `zero`, `deepspeed`: more keys of zero_optimization and beside it."""

    def __init__(self, variant: dict[str, Any], processes: Processes):
        variant = dict(variant)
        zero, more = variant.pop("zero", {}), variant.pop("deepspeed", {})
        config = configured(micro_batch_rows=2, **variant)
        config.deepspeed["zero_optimization"] |= zero
        config.deepspeed.update(more)
        self.processes, self.engine = processes, build(config, processes)
        self.balancer, self.batches = create(config.balancer, TASKS, 1), micro_batches(config, self.engine)

    def steps(self, number: int) -> list[float]:
        return [train_step(self.engine, self.balancer, self.batches, LEARNING_RATE).loss for _ in range(number)]

    def link(self) -> None:
        """DeepSpeed links states to parameters in the first group's step, before those of the other groups exist."""
        optimizer = self.engine._engine.optimizer
        if type(optimizer) is DeepSpeedZeroOptimizer:
            for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)

    def states(self) -> States:
        """Name -> [master weights, exp_avg, exp_avg_sq, working weights], whole, by DeepSpeed's own means."""
        result = {}
        working = self.engine.gather_state(self.engine.module)
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.engine.zero_stage == 0:
                master = self._masters().get(parameter, parameter)
                state = self.adam.state[master]
                tensors = [master.detach(), state["exp_avg"], state["exp_avg_sq"]]
            else:
                tensors = [safe_get_full_fp32_param(parameter)] + [safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")]
            if self.processes.is_main:
                tensors.append(working[name])
            result[name] = [tensor.clone().view(-1) for tensor in tensors]
        return result

    def _masters(self) -> dict[torch.Tensor, torch.Tensor]:
        """Those of bfloat16 parameters in stage 0."""
        optimizer = self.engine._engine.optimizer
        if optimizer is self.adam:
            return {}
        return {p: m for ps, ms in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True) for p, m in zip(ps, ms, strict=True)}

    @property
    def adam(self) -> torch.optim.Optimizer:
        optimizer = self.engine._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def adam_steps(self) -> set[float]:
        return {float(state["step"]) for state in self.adam.state.values() if state}


def equal(states: States, others: States) -> bool:
    return states.keys() == others.keys() and all(torch.equal(a, b) for name in states for a, b in zip(states[name], others[name], strict=True))


def distance(states: States, others: States) -> float:
    """The largest relative difference of a parameter's master weights, in the 2-norm."""
    return max(float((states[name][0] - others[name][0]).norm() / others[name][0].norm()) for name in states)


def write(variants: dict[str, dict], folder: str) -> None:
    """Of each variant, FOLDER/VARIANT gets the states after three steps, whole ones to compare with, and a report."""
    processes = Processes()
    for name, variant in variants.items():
        target = Path(folder) / name
        initial = target / "initial"
        initial.mkdir(parents=True, exist_ok=True)
        processes.barrier()
        run = Run(variant, processes)
        run.engine.save(initial)
        first_losses = run.steps(1)
        run.engine.load(initial)
        report = {"untrained": run.adam_steps() == set() and run.steps(1) == first_losses}

        run.steps(2)
        digests = run.engine.save(target)
        contents = {path: (target / path).read_bytes() for path in digests}
        report["digests"] = digests == {path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in contents.items()}
        report["files"] = len(digests) == int(processes.is_main or run.engine.zero_stage > 0)
        run.link()
        saved, losses = run.states(), run.steps(1)
        next_states = run.states()
        losses += run.steps(1)
        last = run.states()
        run.engine.close()

        run = Run(variant, processes)
        run.engine.load(target)
        report["states"] = equal(run.states(), saved) and run.adam_steps() == {3.0}
        report["continued"] = run.steps(2) == losses and equal(run.states(), last) and not equal(last, saved)
        run.engine.close()
        reports = processes.gather_objects(report)
        if processes.is_main:
            torch.save({"saved": saved, "next": next_states, "loss": losses[0], "reports": reports}, target / "reference.pt")
    processes.barrier()
    processes.close()


def read(pairs: list[tuple[dict, list[str]]], folder: str, out: str) -> None:
    """Each pair: a variant, and the names of what it loads, one after another into the same engine."""
    processes, results = Processes(), {}
    for variant, sources in pairs:
        run = Run(variant, processes)
        for source in sources:
            reference = torch.load(Path(folder) / source / "reference.pt", weights_only=True)
            run.engine.load(Path(folder) / source)
            loaded, steps = run.states(), run.adam_steps()
            (loss,) = run.steps(1)
            after = run.states()
            results[f"{source} into {variant}"] = {
                "states": processes.gather_objects(steps == {3.0} and (equal(loaded, reference["saved"]) if processes.is_main else True)),
                "loss": abs(loss / reference["loss"] - 1),
                "distance": distance(after, reference["next"]),
            }
        run.engine.close()
    if processes.is_main:
        torch.save(results, out)
    processes.barrier()
    processes.close()


def fail(folder: str, other_adapter: str, out: str) -> None:
    """On two ranks: a disk that is full for the last rank only; then a checkpoint of another adapter, and one that only rank 0 sees."""
    processes = Processes()
    run = Run({"stage": 2}, processes)
    run.steps(1)
    run.link()
    before = run.states()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if processes.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        written = str(len(run.engine.save(Path(folder))))
    except OSError as error:
        written = type(error).__name__
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    outcomes = [written]
    for place in (other_adapter, folder if processes.is_main else "nowhere"):
        try:
            run.engine.load(Path(place))
            outcomes.append("")
        except UserError as error:
            outcomes.append(str(error))
    outcomes.append(str(equal(run.states(), before)))
    run.engine.close()
    gathered = processes.gather_objects(outcomes)
    if processes.is_main:
        torch.save(gathered, out)
    processes.barrier()
    processes.close()
