"""A model's config, and the model that it describes without any weight."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mftcoder_coba.errors import UserError


def read_architecture(source: str, where: str, fix: str, allow_code: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a folder, of a hub id, or in a config.json.

    Args:
        where, fix: of a mistake.
        allow_code: what to do where the config needs Python code of its own.

    Raises:
        UserError: there is none, or it is not understood.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise UserError("this model's config needs Python code of its own, which is not run", where, allow_code) from error
        raise UserError(f"the model's config cannot be read: {_first_line(error)}", where, fix) from error


def without_weights(architecture: PretrainedConfig, attention: str, dtype: torch.dtype, where: str, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model on torch's meta device: its parameters have shapes alone.

    Args:
        attention: an implementation's name.

    Raises:
        UserError: this is no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"no causal language model can be made of this config: {_first_line(error)}", where) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
