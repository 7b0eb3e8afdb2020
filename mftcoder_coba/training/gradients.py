"""Gradients of single tasks with respect to all trained parameters, by a backward pass for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mftcoder_coba.data import Batch
from mftcoder_coba.engine import Engine
from mftcoder_coba.training.step import inputs_of


def gradients_of(engine: Engine, batches: Iterable[Batch], factors: Tensor) -> Tensor:
    """This rank's part of the gradients of sum_k factors[g, k] S_k, for each g, over the batches of all ranks.

    One forward pass for a batch, as in a step: with the same random state dropout draws the same. It goes around
    DeepSpeed, whose gradients stay as they are; ZeRO-3 is not possible, as parameters must be whole.

    Args:
        factors: [G, K] float64.

    Returns:
        [G, n] float32: the parameters one after the other, flattened, in equal parts by rank; 0 behind the last.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    ranks, size = engine.processes.world_size, sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(len(factors), -(-size // ranks) * ranks, dtype=torch.float32, device=engine.device)
    with torch.enable_grad():
        for batch in batches:
            _add_gradients(total, engine, batch, factors, parameters)
    return torch.stack([engine.processes.reduce_scatter_sum(gradient) for gradient in total])


def _add_gradients(total: Tensor, engine: Engine, batch: Batch, factors: Tensor, parameters: list[nn.Parameter]) -> None:
    """Adds this batch's gradients to `total`, [G, numbers of all parameters or more]."""
    supervised = engine.module.supervised(*inputs_of(engine, batch))
    held = torch.from_numpy(batch.tokens > 0).to(factors.device)
    for index in torch.nonzero((factors[:, held] != 0).any(1)).flatten().tolist():
        loss, _ = engine.module.output_loss(*supervised, factors[index])
        start = 0
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True):
            stop = start + parameter.numel()
            if gradient is not None:
                total[index, start:stop] += gradient.flatten()
            start = stop
