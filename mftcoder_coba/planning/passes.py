"""A micro-batch's forward and backward pass on torch's meta device: what it keeps, and its FLOPs. torch itself counts both, so that any
architecture, adapter and checkpointing is as it is in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.objective.linear_cross_entropy import CHUNK_ELEMENTS
from mftcoder_coba.planning.attention import AttentionPlan, attention_as

# float32 logits of a chunk, and the copy that their log of sums takes.
CHUNK_BYTES = 8


def _grouped_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Experts' products, which torch does not count: [tokens, in] with [experts, in, out], or for their weights [in, tokens] with [tokens, out]."""
    return 2 * left[0] * left[1] * right[-1]


@dataclass(frozen=True)
class Pass:
    """Of one micro-batch on one GPU.

    activation_bytes: kept by the model's layers for the backward pass. loss_bytes: kept by the output layer, whose gradients are formed in
    the forward pass. chunk_bytes: of a chunk of logits. forward_flops: without the output layer. output_flops: of its forward pass.
    training_flops: forward and backward pass of all, with what checkpointing computes again.
    """

    activation_bytes: int
    loss_bytes: int
    chunk_bytes: int
    forward_flops: float
    output_flops: float
    training_flops: float


class KeptTensors:
    """Bytes of the storages that torch keeps for the backward pass; each counts once, parameters and buffers of `model` do not."""

    def __init__(self, model: nn.Module):
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no number comes twice

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return tensor


def measure_pass(objective: MultiTaskObjective, rows: int, length: int, attention: AttentionPlan, supervised_share: float = 1.0) -> Pass:
    """A pass of `rows` full rows through an objective on the meta device.

    Args:
        supervised_share: part of the tokens that reach the output layer.
    """
    weight = objective.output_loss.external_parameters[0]
    tokens = max(1, round(rows * length * supervised_share))
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    labels = torch.zeros(tokens, dtype=torch.int64, device="meta")
    factors = torch.ones(objective.output_loss.num_tasks, dtype=torch.float64, device="meta")
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter, attention_as(attention):
        activations, loss_kept = KeptTensors(objective), KeptTensors(objective)
        with activations.counting():
            hidden = objective.hidden_states(ids, ids, ids)
            # Chosen by a mask in a run, which copies them and keeps the places.
            supervised = hidden.reshape(-1, hidden.shape[-1])[torch.zeros(tokens, dtype=torch.int64, device="meta")]
        layers = counter.get_total_flops() + attention.flops
        with loss_kept.counting():
            loss, _ = objective.output_loss(supervised, labels, labels, torch.ones(tokens, device="meta"), factors)
        loss.backward()
        total = counter.get_total_flops() + attention.flops
    objective.zero_grad(set_to_none=True)
    chunk = CHUNK_BYTES * weight.shape[0] * min(tokens, max(1, CHUNK_ELEMENTS // weight.shape[0]))
    return Pass(activations.total, loss_kept.total, chunk, float(layers), 2.0 * tokens * weight.numel(), float(total))
