"""Which attention implementation a run uses.

Documents packed into one row must not see each other. transformers isolates them where positions restart, if no
attention mask is given and nothing is cached: SDPA and eager through a block mask, flash-attn through the borders that
it passes to its variable-length kernel. Other implementations are not offered, since they would leak.
"""

from __future__ import annotations

import importlib.util

import torch

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
