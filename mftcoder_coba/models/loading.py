"""A Hugging Face folder or hub id -> a causal language model ready for training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mftcoder_coba.config import ModelConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.quantisation import prepare_layers, quantised_loading


def load_model(config: ModelConfig, attention: str, quantise_on: torch.device | None = None) -> nn.Module:
    """Loads the base model.

    Args:
        config: the model section.
        attention: an implementation name as `choose_attention` returns it.
        quantise_on: linear layers are quantised to 4 bits on this device, where the whole model then is; None: they are not.

    Raises:
        UserError: the model cannot be found or read, needs code of its own that was not allowed, or is quantised already.
    """
    where = f"model.path = {config.path}"
    dtype = getattr(torch, config.dtype)
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        _check_not_quantised(architecture, where)
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=architecture,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # no pickle is loaded from a model folder
            **(quantised_loading(dtype, quantise_on) if quantise_on else {}),
        )
        if quantise_on:
            prepare_layers(model)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(error, config, where) from error
    model.config.use_cache = False
    if config.gradient_checkpointing:
        # The re-entrant kind needs inputs that require gradients and loses RNG details; it is on its way out in torch.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_not_quantised(architecture: PretrainedConfig, where: str) -> None:
    quantisation = getattr(architecture, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation.quant_method
        raise UserError(
            f"the weights of this model are quantised already (method: {method}), and cannot be trained",
            where,
            'give the model as it was before; with adapter.kind = "qlora" it is quantised while it is loaded',
        )


def _explain(error: Exception, config: ModelConfig, where: str) -> UserError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return UserError(
            "this model comes with Python code of its own, which is not run unless you allow it",
            where,
            "read that code, then set model.trust_remote_code = true",
        )
    folder = Path(config.path)
    if folder.is_absolute() and not folder.exists():
        return UserError("no such folder", where)
    if folder.is_absolute() and not (folder / "config.json").is_file():
        return UserError("is not a Hugging Face model folder: it has no config.json", where)
    return UserError(f"the model cannot be loaded: {text}", where, "give a Hugging Face folder with safetensors weights, or a hub id")
