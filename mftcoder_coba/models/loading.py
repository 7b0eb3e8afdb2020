"""A Hugging Face folder or hub id -> a causal language model ready for training."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from mftcoder_coba.config import Config, ModelConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.quantisation import prepare_layers, quantised_loading

# Weights in these files are pickles: reading one can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Reads with torch's restricted unpickler, writes safetensors; called with the old folder and the new one.
CONVERSION = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for c in (M, T)]"
)
TENSORS_TOLD = 3


def load_model(config: ModelConfig, attention: str, quantise_on: torch.device | None = None) -> nn.Module:
    """Loads the base model.

    Args:
        config: the model section.
        attention: an implementation name as `choose_attention` returns it.
        quantise_on: linear layers are quantised to 4 bits on this device, where the whole model then is; None: they are not.

    Raises:
        UserError: the model cannot be found or read, its weights are pickles or do not fill it, it needs code of its own that was not
            allowed, or it is quantised already.
    """
    where = f"model.path = {config.path}"
    dtype = getattr(torch, config.dtype)
    check_weights_files(Path(config.path), where)
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        _check_not_quantised(architecture, where)
        model, found = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=architecture,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # no pickle is loaded from a model folder
            weights_only=True,  # nor any code, where a hub id's index names a pickle for all that
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **(quantised_loading(dtype, quantise_on) if quantise_on else {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError, pickle.UnpicklingError) as error:
        raise _explain(error, config, where) from error
    _check_filled(found, where)
    if quantise_on:
        prepare_layers(model)
    if config.gradient_checkpointing:
        # The re-entrant kind needs inputs that require gradients and loses RNG details; it is on its way out in torch.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_sizes(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises UserError where the model has no place for the tokenizer's tokens, or for rows of `data.sequence_length`."""
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {size}",
            f"model.path = {config.model.path}",
            "use the tokenizer that belongs to the model, or enlarge the embedding and save the model first",
        )
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    # Scaled rotary embeddings reach further than this number says.
    scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if longest and config.data.sequence_length > longest and not scaled:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, the model was made for at most {longest} positions",
            "data.sequence_length",
            "choose a smaller sequence_length, or a model for longer texts",
        )


def check_weights_files(folder: Path, where: str) -> None:
    """Raises UserError for a folder whose weights would be read from anything but safetensors files in it. A hub id is no folder."""
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        what = "the folder holds an adapter (adapter_config.json), which may name another model as its base"
        raise UserError(what, where, "give the base model, or merge the adapter into it first")
    weights = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles and not weights:
        what = f"the weights are pickles ({', '.join(pickles[:TENSORS_TOLD])}), which can run any code when they are read; only safetensors are"
        old, new = shlex.quote(str(folder)), shlex.quote(f"{folder}-safetensors")
        raise UserError(what, where, f"convert the folder, if you trust it, and name the new one: python -c {shlex.quote(CONVERSION)} {old} {new}")
    index = folder / "model.safetensors.index.json"
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else []
        strangers = sorted({name for name in named if PurePosixPath(name).name != name or not name.endswith(".safetensors")})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError("is no index of weights", str(index), "fetch the model again") from None
    if strangers:
        raise UserError(f"the index names {strangers[0]}, which is no safetensors file of this folder", str(index), "fetch the model again")


def _check_filled(found: dict[str, Any], where: str) -> None:
    """`found`: transformers' loading info. Raises UserError for parameters that no file had, which are random now."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"the weights hold nothing for {_told(missing)}", where, "fetch the model again; config.json may be of another model")
    other = [f"{name}: {list(stored)} in the file, {list(needed)} in the model" for name, stored, needed in sorted(found["mismatched_keys"])]
    if other:
        raise UserError(f"config.json does not fit the weights: {_told(other, '; ')}", where, "fetch the model again")


def _told(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - TENSORS_TOLD} more" if len(items) > TENSORS_TOLD else ""
    return separator.join(items[:TENSORS_TOLD]) + more


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
    if isinstance(error, SafetensorError):
        return UserError(f"a weights file is damaged, or no safetensors file: {text}", where, "fetch the model again")
    fix = "give a Hugging Face folder with safetensors weights, or a hub id of such; pickles (pytorch_model.bin) are not read"
    return UserError(f"the model cannot be loaded: {text}", where, fix)
