"""The base model of QLoRA (arXiv 2305.14314): its linear layers in 4-bit NormalFloat with double quantisation, by bitsandbytes.

What is not a linear layer (embeddings, norms), and the output layer, stay in `model.dtype`. PEFT's `prepare_model_for_kbit_training` would
turn them into float32; it is not used: DeepSpeed casts every parameter to the one dtype of the run, norms and logits are
computed in float32 anyhow, and a float32 output layer would double the memory of the largest matrix. The rest of what it does, PEFT's
adapters (frozen base) and checkpointing that is not re-entrant (no gradients of inputs needed) do already.

The quantised model is a function of the model folder. It is made anew when a run resumes, and no checkpoint holds it.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from mftcoder_coba.config import AdapterConfig
from mftcoder_coba.errors import UserError

# On some CPUs it warns, when it is imported, of a missing kernel for inference. `prepare_layers` switches that path off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Keys of DeepSpeed's zero_optimization that do arithmetic on parameters while they travel. A packed weight is no number: they would destroy it.
_ARITHMETIC_ON_THE_WAY = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "stage3_use_all_reduce_for_fetch_params")


def check_quantisation(config: AdapterConfig, deepspeed_config: dict[str, Any]) -> None:
    """To be called before anything is loaded.

    Raises:
        UserError: a quantised base is asked for, and cannot be had here.
    """
    if not config.quantised:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("a quantised base model needs the package bitsandbytes", f'adapter.kind = "{config.kind}"', "pip install bitsandbytes")
    zero = deepspeed_config.get("zero_optimization", {})
    for key in _ARITHMETIC_ON_THE_WAY:
        if zero.get("stage") == 3 and zero.get(key):
            raise UserError(
                "computes with parameters while they travel between ranks; 4-bit weights are packed bits, which that would destroy",
                f"deepspeed.zero_optimization.{key}",
                'remove it, or use an adapter without quantisation, such as adapter.kind = "lora"',
            )


def quantised_loading(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained`: each linear layer is quantised on `device` as soon as it is read.

    The packed bits are stored in tensors of `dtype`, so that ZeRO-3 gathers them together with the other parameters.
    """
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def prepare_layers(model: nn.Module) -> None:
    """Makes the 4-bit layers of a model that was loaded with `quantised_loading` fit for training.

    Raises:
        UserError: the model has none, or less in them than in experts, or bitsandbytes does not get their weights right on this device.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise UserError("no layer of this model can be quantised: none is a plain linear one", "adapter", 'use "lora", or "quantised": false')
    # transformers holds all experts of a layer in one tensor [experts, ...], which is no linear layer.
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 2)
    if experts > sum(full_size(layer.weight) for layer in layers):
        raise UserError(
            f"{experts / 1e9:.2g} billion parameters of this model are experts, which bitsandbytes cannot quantise: they would stay whole",
            "adapter",
            'use "lora", or "quantised": false, and part the model over GPUs by ZeRO-3',
        )
    for width, device in sorted({(layer.in_features, layer.weight.device) for layer in layers}, key=str):
        _check_kernel(width, device)
    for layer in layers:
        # Without gradients, bitsandbytes would repack a weight in place for a bfloat16 kernel of newer CPUs, which has no backward pass: the
        # first validation would end the training.
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_leave_out_weight)


def _check_kernel(width: int, device: torch.device) -> None:
    """Quantises a small matrix [64, width] and back. Release 0.50.2 mixes up the blocks of 64 on CPUs with AVX-512, for some widths."""
    from bitsandbytes import __version__
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.linspace(1.0, 64.0, 64, device=device)[:, None].repeat(1, width)
    blocks, again = rows.view(-1, 64), dequantize_4bit(*quantize_4bit(rows, blocksize=64, quant_type="nf4")).view(-1, 64)
    # The widest gap between two values of NF4, -1 and -0.6962 of a block's largest, gives the largest error.
    if ((again - blocks).abs() > 0.1525 * blocks.amax(dim=1, keepdim=True)).any():
        raise UserError(
            f"bitsandbytes {__version__} computes wrong 4-bit weights on this {device.type} for layers of input width {width}; "
            "multiples of 64 are right",
            "adapter",
            'use "lora" or "quantised": false for this model, or a GPU',
        )


def full_size(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for, also where it is packed to 4 bits, or where ZeRO-3 holds only a part of it."""
    quantisation = getattr(parameter, "quant_state", None)
    return quantisation.shape.numel() if quantisation is not None else getattr(parameter, "ds_numel", parameter.numel())


def _leave_out_weight(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name == f"{prefix}weight" or name.startswith(f"{prefix}weight.")]:
        del state[name]
