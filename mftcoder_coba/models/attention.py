"""Which attention implementation a run uses.

Documents packed into one row must not see each other. transformers isolates them where positions restart, if no
attention mask is given and nothing is cached: SDPA and eager through a block mask, flash-attn through the borders that
its variable-length kernel gets. Other implementations are not offered, since they would leak; whether a model's layers
really keep documents apart is tried out before a run (`MultiTaskObjective.check_isolation`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mftcoder_coba.errors import UserError


def choose_attention(wanted: str, device: torch.device, dtype: str) -> str:
    """For "auto": flash-attn where it is installed on a GPU and the dtype is bfloat16, else SDPA.

    Raises:
        UserError: flash_attention_2 is asked for where it cannot run.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    usable = device.type == "cuda" and installed and dtype == "bfloat16"
    if wanted == "auto":
        return "flash_attention_2" if usable else "sdpa"
    if wanted == "flash_attention_2" and not usable:
        reason = (
            "there is no GPU"
            if device.type != "cuda"
            else "the package flash-attn is not installed"
            if not installed
            else "it does not compute in float32"
        )
        raise UserError(f"flash_attention_2 cannot be used: {reason}", "model.attention", 'use "auto" or "sdpa"')
    return wanted


def document_borders(position_ids: Tensor) -> dict[str, Any]:
    """Arguments of flash-attn's variable-length kernel, by transformers' names, for rows that are laid end to end.

    Left to itself, transformers finds the borders anew in each layer and waits for the GPU each time. This waits once.

    Args:
        position_ids: [1, tokens] int64, 0 where a document (or a row) begins.
    """
    starts = (position_ids.view(-1) == 0).nonzero().view(-1)
    borders = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
