"""flash-attn's functions in plain torch, put in the library's place inside transformers: what it is called with, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


@dataclass
class Calls:
    """borders: cu_seqlens of each call of the variable-length function; longest: its max_seqlen; dense: calls of the plain one."""

    borders: list[list[int]] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    dense: int = 0


@contextmanager
def flash_reference(model: PreTrainedModel) -> Iterator[Calls]:
    """Within it, `model` attends by flash_attention_2."""
    calls = Calls()

    # Parameters as in flash-attn 2.8, since transformers looks at their names.
    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        """q, k, v: [tokens, heads, width], documents end to end; cu_seqlens: [documents + 1] int32."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k
        assert causal and dropout_p == softcap == 0.0 and alibi_slopes is block_table is None and not return_attn_probs
        borders = cu_seqlens_q.tolist()
        assert borders[0] == 0 and borders[-1] == len(q) == len(k) == len(v)
        calls.borders.append(borders)
        calls.longest.append(max_seqlen_q)
        lengths = [stop - start for start, stop in zip(borders, borders[1:], strict=False)]
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_attend(*part, softmax_scale, window_size) for part in parts])

    def dense(q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False) -> Tensor:
        """[rows, length, heads, width]."""
        calls.dense += 1
        return torch.stack([_attend(*part, softmax_scale, window_size) for part in zip(q, k, v, strict=True)])

    module = modeling_flash_attention_utils
    before = model.config._attn_implementation
    with mock.patch.multiple(
        module,
        _loaded_implementation="flash_attention_2",
        _flash_fn=dense,
        _flash_varlen_fn=varlen,
        _process_flash_kwargs_fn=module._lazy_define_process_function(varlen),
    ):
        model.config._attn_implementation = "flash_attention_2"
        try:
            yield calls
        finally:
            model.config._attn_implementation = before


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """One document alone, [length, heads, width]; `window`: how many tokens before it a token sees at most, -1: all."""
    ago = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    seen = (ago >= 0) & ((ago <= window[0]) | (window[0] < 0))
    q, k, v = (values.transpose(0, 1)[None] for values in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
