"""A run on a number of GPUs: memory, traffic, FLOPs and time, from its config and its model's config."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mftcoder_coba.config import Config
from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.planning.attention import AttentionPlan
from mftcoder_coba.planning.empty_model import ModelSize, architecture_of, empty_model, size_of
from mftcoder_coba.planning.extra import BalancerCost, cost_of
from mftcoder_coba.planning.memory import GIB, USABLE, Activations, GpuMemory, Sharing, gpu_memory, largest_micro_batch, smallest_fit
from mftcoder_coba.planning.passes import Pass, measure_pass
from mftcoder_coba.planning.steps import accumulation_steps
from mftcoder_coba.planning.traffic import SIZES, Traffic, traffic_of


@dataclass(frozen=True)
class Cluster:
    """memory_gib: of a GPU. peak_tflops: of a GPU in the model's dtype; utilisation: part of it that training reaches.
    bandwidth_gb: 1e9 bytes a second that one GPU sends."""

    gpus: int
    gpus_per_node: int
    memory_gib: float
    peak_tflops: float
    utilisation: float
    bandwidth_gb: float

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return USABLE * self.memory_gib * GIB


@dataclass(frozen=True)
class ClusterPlan:
    """Of one GPU.

    attention: the kind that was counted. memory: with the config's DeepSpeed keys; other_activations: those of the same micro-batch with
    checkpointing the other way round. fit: the smallest `zero_optimization` with which it fits, and its memory; None: none does.
    micro_rows: the largest micro-batch that fits; None: not even one row does. step_flops: of a step without the balancer.
    kept: the pass that memory and FLOPs come from. traffic: by number of GPUs.
    """

    size: ModelSize
    sharing: Sharing
    attention: str
    memory: GpuMemory
    other_activations: float
    fit: tuple[dict[str, Any], GpuMemory] | None
    micro_rows: int | None
    kept: Activations
    step_flops: float
    cost: BalancerCost
    traffic: dict[int, Traffic]

    @property
    def row(self) -> Pass:
        return self.kept.one

    @property
    def balancer_share(self) -> float:
        """The balancer's FLOPs over those of a step, spread over its update interval."""
        return self.cost.flops / self.cost.interval / self.step_flops


def plan_cluster(config: Config, cluster: Cluster, model_config: Path | None = None, supervised_share: float = 1.0) -> ClusterPlan:
    """Rows are taken as full.

    Args:
        model_config: a config.json, where `model.path` is not here.
        supervised_share: supervised tokens of all tokens.

    Raises:
        UserError: the model's config cannot be had; or its computation cannot be followed without numbers.
    """
    training, architecture = config.training, architecture_of(config, model_config)
    micro_batches, rows = accumulation_steps(config, cluster.gpus), training.micro_batch_rows
    size, kept, other = _activations(config, architecture, supervised_share)
    number = getattr(torch, config.model.dtype).itemsize
    zero = config.deepspeed.get("zero_optimization", {"stage": 0})
    sharing = Sharing.of(zero, cluster.gpus, number)
    tasks, balancer_rows = len(config.data.tasks), config.validation.balancer_rows_per_rank

    def cost(steps: int) -> BalancerCost:
        return cost_of(config.balancer, kept.one, size, tasks, steps, rows, balancer_rows)

    traffic = {}
    for gpus in sorted({cluster.gpus, *SIZES}):
        steps = max(1, training.global_batch_rows // (rows * gpus))
        traffic[gpus] = traffic_of(size, replace(sharing, gpus=gpus), steps, tasks, cost(steps))
    return ClusterPlan(
        size=size,
        sharing=sharing,
        attention=attention_of(config),
        memory=gpu_memory(size, sharing, kept, rows),
        other_activations=other.bytes_of(rows),
        fit=smallest_fit(size, cluster.gpus, number, kept, rows, cluster.limit),
        micro_rows=largest_micro_batch(size, sharing, kept, training.global_batch_rows // cluster.gpus, cluster.limit),
        kept=kept,
        step_flops=kept.one.training_flops * rows * micro_batches,
        cost=cost(micro_batches),
        traffic=traffic,
    )


def attention_of(config: Config) -> str:
    """The kind that is counted: for "auto" SDPA, which keeps more than flash-attn does."""
    return "sdpa" if config.model.attention == "auto" else config.model.attention


def _activations(config: Config, architecture: PretrainedConfig, supervised_share: float) -> tuple[ModelSize, Activations, Activations]:
    """(size, as the config says of checkpointing, the other way round)."""
    length, wanted = config.data.sequence_length, config.model.gradient_checkpointing
    passes: dict[bool, list[Pass]] = {}
    for checkpointing in (wanted, not wanted):
        model = empty_model(config, architecture, checkpointing)
        size = size_of(model, config)
        objective = MultiTaskObjective(model, len(config.data.tasks))
        attention = AttentionPlan(attention_of(config), masked=config.data.packing != "none")

        def measured(rows: int, objective: MultiTaskObjective = objective, attention: AttentionPlan = attention) -> Pass:
            return measure_pass(objective, rows, length, attention, supervised_share)

        passes[checkpointing] = [_followed(lambda rows=rows: measured(rows), config) for rows in (1, 2)]
    kept = {
        checkpointing: Activations(*pair, recomputed=passes[False][0].activation_bytes / size.layers if checkpointing else 0.0)
        for checkpointing, pair in passes.items()
    }
    return size, kept[wanted], kept[not wanted]


def _followed(measure: Callable[[], Pass], config: Config) -> Pass:
    try:
        return measure()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"this architecture decides by numbers what it computes, which cannot be followed without weights: {str(error).splitlines()[0]}",
            f"model.path = {config.model.path}",
            "memory and FLOPs of this model cannot be planned; steps and data are above",
        ) from error


def write_suggestion(plan: ClusterPlan, file: Path) -> None:
    """Writes the smallest fit as a DeepSpeed file, complete or not at all.

    Raises:
        UserError: nothing fits; the file is there already, or cannot be written.
    """
    if plan.fit is None:
        fix = "set model.gradient_checkpointing, lower training.micro_batch_rows or data.sequence_length, use an adapter, or more GPUs"
        raise UserError("no ZeRO stage fits, so there is nothing to suggest", "--suggest", fix)
    text = json.dumps({"zero_optimization": plan.fit[0]}, indent=2) + "\n"
    try:
        descriptor, new = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as out:
                out.write(text)
            os.link(new, file)  # unlike a rename, never over another file
            file.chmod(0o644)
        finally:
            os.unlink(new)
    except FileExistsError:
        raise UserError("is there already; it is not overwritten", f"--suggest {file}", "name a new file") from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", f"--suggest {file}") from error
