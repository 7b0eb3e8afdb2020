"""The model of a run from its config alone: every shape is there, no weight is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mftcoder_coba.config import Config
from mftcoder_coba.models import add_adapter, count_parameters
from mftcoder_coba.models.architecture import read_architecture, without_weights
from mftcoder_coba.models.quantisation import full_size
from mftcoder_coba.planning.attention import PLANNED, planned_attention

# bitsandbytes' 4-bit form: a byte holds two numbers; a block of 64 has a scale of 8 bits, 256 scales have a float32 (arXiv 2305.14314).
QUANTISED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelSize:
    """Of a model with its adapter, on one device.

    total, trainable: numbers of parameters; one of 4 bits counts as one.
    frozen_bytes: weights that are not trained, as they are held. quantised: numbers of them in 4 bits.
    sizes: numbers of each parameter. largest: of the largest module's own parameters. layers: decoder layers.
    vocabulary, width: of the output layer.
    """

    total: int
    trainable: int
    frozen_bytes: int
    quantised: int
    sizes: tuple[int, ...]
    largest: int
    layers: int
    vocabulary: int
    width: int


def architecture_of(config: Config, file: Path | None = None) -> PretrainedConfig:
    """The model's config: `file`, else that of `model.path`, which may be a hub id.

    Raises:
        UserError: there is none, or it is not understood.
    """
    source, where = (str(file), "--model-config") if file else (config.model.path, f"model.path = {config.model.path}")
    return read_architecture(
        source,
        where,
        fix="give a folder with config.json, a hub id where there is a network (or that was fetched before), or --model-config CONFIG_JSON",
        allow_code="read the code that comes with this model, then set model.trust_remote_code = true",
        trust_remote_code=config.model.trust_remote_code,
    )


def empty_model(config: Config, architecture: PretrainedConfig, checkpointing: bool) -> nn.Module:
    """The model as a run trains it, on torch's meta device; its attention is `planned_attention`.

    Raises:
        UserError: this is no causal language model; or see `models.add_adapter`.
    """
    ALL_ATTENTION_FUNCTIONS.register(PLANNED, planned_attention)
    dtype = getattr(torch, config.model.dtype)
    model = without_weights(architecture, PLANNED, dtype, f"model.path = {config.model.path}", config.model.trust_remote_code)
    with torch.device("meta"):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        adapted = add_adapter(model, config.adapter, config.data.task_names)
    # DeepSpeed casts every parameter to the one dtype of the run.
    return adapted.to(dtype).train()


def size_of(model: nn.Module, config: Config) -> ModelSize:
    """Counts. What bitsandbytes quantises are the base model's linear layers but the output one (see `models.quantisation`)."""
    total, trainable = count_parameters(model)
    output = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    frozen = {p: p.numel() for p in model.parameters() if not p.requires_grad}
    quantised = 0
    if config.adapter and config.adapter.quantised:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]
        quantised = sum(frozen.get(layer.weight, 0) for layer in layers)
    number_bytes = getattr(torch, config.model.dtype).itemsize
    text = model.config.get_text_config()
    return ModelSize(
        total=total,
        trainable=trainable,
        frozen_bytes=round((sum(frozen.values()) - quantised) * number_bytes + quantised * QUANTISED_BYTES),
        quantised=quantised,
        sizes=tuple(full_size(parameter) for parameter in model.parameters()),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        layers=text.num_hidden_layers,
        vocabulary=output.weight.shape[0],
        width=output.weight.shape[1],
    )
