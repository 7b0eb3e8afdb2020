"""Bytes of one GPU by kind, for DeepSpeed's ZeRO stages (arXiv 1910.02054, section 5) as its release 0.19 lays them out.

c: bytes of a number in the model's dtype. P: trained parameters. F: bytes of frozen weights. n: GPUs. The optimizer is AdamW: float32
parameters ("master", where they are not the weights themselves) and two float32 moments.

stage   weights        gradients       optimizer   at the optimizer's step, beside or instead of the gradients
0       c P + F        c P             8 P, and 4 P master in bfloat16      c P, and 4 P in float32 in bfloat16
1       c P + F        c P             12 P / n    (c + 4) P / n
2       c P + F        c P / n         12 P / n    (c + 4) P / n
3       (c P + F) / n  c P / n         12 P / n    c P / n and 4 P / n (at most 4 x sub_group_size)

DeepSpeed's own estimators, for bfloat16 without frozen weights, say 2 P + 18 P / n for stage 2, as here, and 18 P / n for stage 3, which leaves
the weights' 2 P / n out: a run holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mftcoder_coba.objective.linear_cross_entropy import CHUNK_ELEMENTS
from mftcoder_coba.planning.empty_model import ModelSize
from mftcoder_coba.planning.passes import CHUNK_BYTES, Pass

GIB = 2**30
# What stays free for CUDA's context, NCCL's buffers and the allocator's fragments: none of them is counted.
USABLE = 0.92
LARGEST_CHUNK = CHUNK_BYTES * CHUNK_ELEMENTS
STAGE0_BUCKET = 500_000_000  # numbers that DeepSpeed's engine flattens for one all-reduce
# The ways to hold a model, from the fastest to the one that takes least of a GPU.
OFFLOAD = {"device": "cpu", "pin_memory": True}
LADDER: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
)


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed holds the states.

    bucket, live, reuse, persistent, sub_group: numbers of parameters, DeepSpeed's `reduce_bucket_size`, `stage3_max_live_parameters`,
    `stage3_max_reuse_distance`, `stage3_param_persistence_threshold`, `sub_group_size`.
    buckets: buffers of a bucket's size. offload_optimizer, offload_parameters: to the memory of the machine.
    """

    stage: int
    gpus: int
    number_bytes: int
    bucket: int
    buckets: int
    live: int
    reuse: int
    persistent: int
    sub_group: int
    offload_optimizer: bool
    offload_parameters: bool

    @classmethod
    def of(cls, zero: dict[str, Any], gpus: int, number_bytes: int) -> Sharing:
        """From DeepSpeed's `zero_optimization`; what it leaves out has DeepSpeed's defaults."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        full = DeepSpeedZeroConfig(**zero)
        stage = int(full.stage)
        buffers = 0 if stage == 0 or not full.contiguous_gradients else 2 if full.overlap_comm and stage < 3 else 1
        return cls(
            stage=stage,
            gpus=gpus,
            number_bytes=number_bytes,
            bucket=full.reduce_bucket_size,
            buckets=buffers,
            live=full.max_live_parameters,
            reuse=full.max_reuse_distance,
            persistent=full.param_persistence_threshold,
            sub_group=full.sub_group_size,
            offload_optimizer=full.offload_optimizer is not None and full.offload_optimizer.device != "none",
            offload_parameters=full.offload_param is not None and full.offload_param.device != "none",
        )


@dataclass(frozen=True)
class States:
    """Bytes on one GPU; host: of the machine's memory for one GPU. step_gradients: at the optimizer's step, with their float32 copy."""

    weights: float
    gradients: float
    optimizer: float
    step_gradients: float
    host: float

    @property
    def at_step(self) -> float:
        return self.weights + self.optimizer + self.step_gradients


@dataclass(frozen=True)
class GpuMemory:
    """The largest bytes of one GPU by kind; activations are what is kept, and what checkpointing computes again of one layer.

    gathered: whole weights that ZeRO-3 holds for the layers at work. buffers: DeepSpeed's for communication; held_buffers: those of them
    that are there at the optimizer's step.
    """

    states: States
    activations: float
    loss: float
    gathered: float
    buffers: float
    held_buffers: float

    @property
    def in_backward(self) -> float:
        return self.states.weights + self.states.gradients + self.states.optimizer + self.activations + self.loss + self.gathered + self.buffers

    @property
    def peak(self) -> float:
        return max(self.in_backward, self.at_step)

    @property
    def at_step(self) -> float:
        return self.states.at_step + self.held_buffers


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch, with or without checkpointing, linear in its rows: passes of `one` row and of `two`.

    recomputed: what checkpointing computes again of one layer, for a row.
    """

    one: Pass
    two: Pass
    recomputed: float = 0.0

    def activations_of(self, rows: int) -> float:
        """What the layers keep."""
        return self.one.activation_bytes + (rows - 1) * (self.two.activation_bytes - self.one.activation_bytes)

    def kept_by_loss(self, rows: int) -> float:
        """What the output layer keeps."""
        return self.one.loss_bytes + (rows - 1) * (self.two.loss_bytes - self.one.loss_bytes)

    def bytes_of(self, rows: int) -> float:
        """The layers' largest: with what checkpointing computes again of one of them."""
        return self.activations_of(rows) + rows * self.recomputed

    def loss_of(self, rows: int) -> float:
        """The output layer's largest: with a chunk of logits."""
        return self.kept_by_loss(rows) + min(rows * self.one.chunk_bytes, LARGEST_CHUNK)


def states_of(size: ModelSize, sharing: Sharing) -> States:
    """The table above; what is offloaded is in the machine's memory instead: there gradients are float32."""
    trained, number, stage = float(size.trainable), sharing.number_bytes, sharing.stage
    parts = sharing.gpus if stage else 1
    weights = number * trained + size.frozen_bytes
    optimizer = 8 * trained + (4 * trained if stage or number < 4 else 0)
    gradients, step_gradients = number * trained, number * trained / parts
    copy = 4 * trained / parts if stage or number < 4 else 0.0
    if stage == 3:
        weights, copy = weights / parts, min(copy, 4.0 * sharing.sub_group)
    if stage >= 2:
        gradients /= parts
    states = States(weights, gradients, optimizer / parts, step_gradients + copy, 0.0)
    if sharing.offload_optimizer:
        # Stage 1 keeps whole gradients on the GPU until the step; the others hand them over bucket by bucket.
        left = gradients if stage == 1 else 0.0
        states = replace(states, gradients=left, optimizer=0.0, step_gradients=left, host=optimizer / parts + 4 * trained / parts)
    if sharing.offload_parameters and stage == 3:
        states = replace(states, weights=0.0, host=states.host + weights)
    return states


def gpu_memory(size: ModelSize, sharing: Sharing, activations: Activations, rows: int) -> GpuMemory:
    """With micro-batches of `rows` full rows."""
    number = sharing.number_bytes
    buffers = number * sharing.bucket * sharing.buckets if sharing.stage else number * min(size.trainable, STAGE0_BUCKET)
    gathered = 0.0
    if sharing.stage == 3:
        packed = (size.total * number if not size.quantised else size.frozen_bytes + number * size.trainable) / size.total
        gathered = packed * min(size.total, max(sharing.live, size.largest))
    held = float(buffers) if sharing.stage == 3 else 0.0
    return GpuMemory(states_of(size, sharing), activations.bytes_of(rows), activations.loss_of(rows), gathered, float(buffers), held)


def bucket_of(size: ModelSize) -> int:
    """A bucket as large as it helps: 2e8 numbers keep a link busy; more than there are gradients is waste."""
    return max(2, min(200_000_000, 2 * math.ceil(size.trainable / 2)))


def suggested_zero(rung: dict[str, Any], size: ModelSize) -> dict[str, Any]:
    """A rung of `LADDER` as DeepSpeed's `zero_optimization`, with buckets that fit the model."""
    zero, bucket = dict(rung), bucket_of(size)
    if zero["stage"]:
        zero |= {"overlap_comm": zero["stage"] > 1, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    if zero["stage"] in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if zero["stage"] == 3:
        live = max(size.largest, min(1_000_000_000, size.total))
        if "offload_param" in zero:
            live = max(size.largest, live // 2)
        zero |= {"stage3_prefetch_bucket_size": min(100_000_000, live), "stage3_param_persistence_threshold": 100_000}
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    return zero


def smallest_fit(
    size: ModelSize, gpus: int, number_bytes: int, activations: Activations, rows: int, limit: float
) -> tuple[dict[str, Any], GpuMemory] | None:
    """The first rung of `LADDER`, as `zero_optimization`, whose peak is at most `limit` bytes, and that memory; None: none is."""
    for rung in LADDER:
        zero = suggested_zero(rung, size)
        memory = gpu_memory(size, Sharing.of(zero, gpus, number_bytes), activations, rows)
        if memory.peak <= limit:
            return zero, memory
    return None


def largest_micro_batch(size: ModelSize, sharing: Sharing, activations: Activations, rows_per_gpu: int, limit: float) -> int | None:
    """Of the divisors of a GPU's rows of a step the largest with which the peak is at most `limit` bytes; None: not even 1."""
    divisors = [rows for rows in range(rows_per_gpu, 0, -1) if rows_per_gpu % rows == 0]
    return next((rows for rows in divisors if gpu_memory(size, sharing, activations, rows).peak <= limit), None)
