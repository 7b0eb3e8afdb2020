"""Adapters, through PEFT. Without one, all parameters are trained."""

from __future__ import annotations

from torch import nn

from mftcoder_coba.config import AdapterConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.quantisation import full_size


def add_adapter(model: nn.Module, config: AdapterConfig | None) -> nn.Module:
    """The model with a fresh adapter whose parameters alone are trained; the model itself where `config` is None.

    Raises:
        UserError: `target_modules` names nothing in this model.
    """
    if config is None:
        return model
    # Takes seconds to import, and imports bitsandbytes where that is installed.
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise UserError(
            str(error).splitlines()[0], f"adapter.target_modules = {config.target_modules!r}", f"linear layers of this model: {', '.join(names)}"
        ) from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Total and trainable numbers of parameters; one of 4 bits counts as one."""
    total = trainable = 0
    for parameter in model.parameters():
        size = full_size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable
