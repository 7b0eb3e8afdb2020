"""Attention as far as a plan goes: what it keeps for the backward pass, and its FLOPs. No number is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLANNED = "mftcoder_coba_planned"


@dataclass
class AttentionPlan:
    """implementation: "sdpa", "eager" or "flash_attention_2". masked: rows hold several documents. flops: counted so far."""

    implementation: str
    masked: bool
    flops: int = 0


_now: list[AttentionPlan] = []


@contextlib.contextmanager
def attention_as(plan: AttentionPlan) -> Iterator[None]:
    """Within it, `planned_attention` is one of this kind, and counts in `plan`."""
    _now.append(plan)
    try:
        yield
    finally:
        _now.pop()


def planned_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """In the place of transformers' attention functions: [rows, heads, length, width] -> [rows, length, heads, width]."""
    plan = _now[-1]
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (plan.implementation == "eager" or (plan.implementation == "sdpa" and plan.masked)):
        # transformers repeats the key and value heads where torch's kernels cannot.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _Attention.apply(query, key, value, plan).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Two products of length x length x width for each head, over whole rows; twice and a half of it backward, where fused kernels form the
    scores again (arXiv 2205.14135, section 3). Borders between documents, which flash-attn makes use of, are not counted."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        rows, heads, length, width = query.shape
        ctx.plan, ctx.flops = plan, 2 * rows * heads * length * length * (width + value.shape[-1])
        plan.flops += ctx.flops
        out = query.new_empty(rows, heads, length, value.shape[-1])
        kept = [query, key, value]
        if plan.implementation == "eager":  # probabilities, which are formed in float32, and again in the model's dtype
            scores = query.new_empty(rows, heads, length, length, dtype=torch.float32)
            kept += [scores] if query.dtype == torch.float32 else [scores, scores.to(query.dtype)]
        else:
            kept += [out, query.new_empty(rows, heads, length, dtype=torch.float32)]
            if plan.implementation == "sdpa" and plan.masked:  # torch makes numbers of the block mask in each layer
                kept.append(query.new_empty(rows, 1, length, length))
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        ctx.plan.flops += ctx.flops * (2 if ctx.plan.implementation == "eager" else 5 / 2)
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
