"""What a balancer's measurements cost beside a step, from the signals that it declares (see `training/observation.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mftcoder_coba.balancing import VALIDATION_SIGNALS, signals_of
from mftcoder_coba.config import BalancerConfig
from mftcoder_coba.planning.empty_model import ModelSize
from mftcoder_coba.planning.passes import Pass


@dataclass(frozen=True)
class BalancerCost:
    """Of one observation on one GPU; `interval`: steps between two.

    flops: of its forward passes and gradients. forward_passes: how often the whole model is gone through. loss_reductions: all-reduces of
    losses. scattered_numbers: float32 numbers of task gradients that are reduce-scattered.
    """

    flops: float
    forward_passes: float
    loss_reductions: int
    scattered_numbers: float
    interval: int


def cost_of(
    balancer: BalancerConfig, row: Pass, size: ModelSize, tasks: int, micro_batches: int, micro_rows: int, balancer_rows: int
) -> BalancerCost:
    """Args:
    row: of one full row. micro_batches, micro_rows: of a step on one GPU. balancer_rows: of a validation mini-batch on one GPU.
    """
    wanted, step_rows = signals_of(balancer), micro_batches * micro_rows
    forward, backward = row.forward_flops + row.output_flops, row.training_flops - row.forward_flops - row.output_flops
    before, after = "validation_losses_before" in wanted, bool(wanted & (VALIDATION_SIGNALS - {"validation_losses_before"}))
    again = "train_losses_after" in wanted
    passes = math.ceil(balancer_rows / micro_rows) * (before + after) + micro_batches * again
    flops = forward * (balancer_rows * (before + after) + step_rows * again)
    layer, scattered = size.vocabulary * (size.width + 1), 0.0
    # Two products of the size of the output layer's forward pass for each set of tokens, and K gradients of the layer to send.
    for signal, sets in {
        "output_gradient_norms": [step_rows],
        "validation_output_gradient_norms": [balancer_rows],
        "output_gradient_products": [step_rows, balancer_rows],
    }.items():
        if signal in wanted:
            flops += 2 * row.output_flops * sum(sets)
            scattered += layer * (tasks + len(sets) - 1)
    if "full_gradient_products" in wanted:
        # A backward pass for each task over the step's batch, one over the validation mini-batch.
        flops += step_rows * (forward + tasks * backward) + balancer_rows * (forward + backward)
        scattered += size.trainable * (tasks + 1)
        passes += micro_batches + math.ceil(balancer_rows / micro_rows)
    return BalancerCost(flops, passes, before + after + again, scattered, getattr(balancer, "update_interval", 1))
