"""Bytes that one GPU sends in an optimizer step, counted from what `engine/`, `training/` and DeepSpeed 0.19 do.

A ring over n GPUs sends 2 (n - 1) / n of a tensor for an all-reduce, (n - 1) / n for a reduce-scatter or an all-gather (of the whole tensor).
c: bytes of a number in the model's dtype; P: trained parameters; W: bytes of all weights; A: micro-batches of a step; K: tasks.

gradients   stage 0, 1: all-reduced once; stage 2: all-reduced in each micro-batch (DeepSpeed reduces buckets that belong to several ranks
            so); stage 3: reduce-scattered in each micro-batch.   c P each time
weights     stage 1, 2: trained ones gathered after the step; stage 3: W gathered for the forward and for the backward pass of each
            micro-batch, but for what stays from one to the other (`stage3_max_live_parameters`, `stage3_max_reuse_distance`); those below
            `stage3_param_persistence_threshold` once a step; and W for each forward pass of the balancer
counts      one all-reduce of 2 K + 1 float64 before the first backward
sums        one all-reduce of K + n float64: S_k, and each rank's fingerprint of the task weights (the weight check)
stop flag   one all-reduce of a float64
balancer    one all-reduce of 3 K float64 for each set of losses; a reduce-scatter of gradients for each method that needs them
"""

from __future__ import annotations

from dataclasses import dataclass

from mftcoder_coba.planning.empty_model import ModelSize
from mftcoder_coba.planning.extra import BalancerCost
from mftcoder_coba.planning.memory import Sharing

FLOAT64 = 8
SIZES = (8, 16, 64, 1024)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, by what they are."""

    gradients: float
    weights: float
    counts: float
    sums: float
    stop_flag: float
    balancer: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.counts + self.sums + self.stop_flag + self.balancer


def traffic_of(size: ModelSize, sharing: Sharing, accumulation: int, tasks: int, cost: BalancerCost) -> Traffic:
    """On `sharing.gpus` GPUs; the balancer's part is spread over its update interval."""
    n, number = sharing.gpus, sharing.number_bytes
    once = (n - 1) / n
    gradients, all_weights = number * size.trainable, size.frozen_bytes + number * size.trainable
    reductions = {0: 2.0, 1: 2.0, 2: 2.0 * accumulation, 3: 1.0 * accumulation}[sharing.stage]
    if sharing.stage == 3:
        gathers = all_weights * _gathers(size, sharing, accumulation)
    else:
        gathers = float(gradients if sharing.stage else 0)
    for_balancer = cost.loss_reductions * 2 * 3 * tasks * FLOAT64 + cost.scattered_numbers * 4
    if sharing.stage == 3:  # but for what is whole always
        for_balancer += cost.forward_passes * all_weights
    return Traffic(
        gradients=once * reductions * gradients,
        weights=once * gathers,
        counts=once * 2 * (2 * tasks + 1) * FLOAT64,
        sums=once * 2 * (tasks + n) * FLOAT64,
        stop_flag=once * 2 * FLOAT64,
        balancer=once * for_balancer / cost.interval,
    )


def _gathers(size: ModelSize, sharing: Sharing, accumulation: int) -> float:
    """How often ZeRO-3 gathers the model in a step, on average over its parameters; a checkpointed layer is gathered once for its backward pass."""
    always = sum(numbers for numbers in size.sizes if numbers <= sharing.persistent) / size.total
    stays = min(1.0, min(sharing.live, sharing.reuse) / size.total)
    return always + (1 - always) * (2 - stays) * accumulation
