"""What was exported, read again: in which folder it is, and a plain LoRA adapter on its base model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models.cgc_lora.model import CONFIG_FILE, TENSORS_FILE


def exported_folder(source: Path) -> Path:
    """The folder of the adapter (it has a `CONFIG_FILE`) or of the full model that `source` is, or that it holds as a run folder.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        raise UserError("no such folder", str(source), "give a run folder, or its folder export")
    if (source / CONFIG_FILE).is_file():
        return source
    if (source / "export").is_dir():
        return exported_folder(source / "export")
    if (source / "metrics.jsonl").is_file() or (source / "checkpoints").is_dir():
        raise UserError("this run has exported no model yet", str(source), "wait for its first validation, or train on")
    if (source / "config.json").is_file():
        return source
    what = f"holds neither a run nor an adapter nor a model (no {CONFIG_FILE}, no config.json)"
    raise UserError(what, str(source), "give a run folder, or its folder export")


def adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's config, in PEFT's keys. Raises UserError where it cannot be read."""
    path = folder / CONFIG_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter's config cannot be read: {getattr(error, 'strerror', None) or error}", str(path), "copy it again") from None
    if not isinstance(tree, dict):
        raise UserError("the adapter's config is no JSON object", str(path), "copy it again")
    return tree


def check_plain_adapter(folder: Path) -> None:
    """Raises UserError for what is no whole LoRA adapter in safetensors."""
    kind = adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise UserError(f"holds an adapter of the type {kind}, not LORA", str(folder), "copy the folder again")
    if (folder / "adapter_model.bin").is_file() and not (folder / TENSORS_FILE).is_file():
        raise UserError(
            "the adapter is a pickle, which can run any code when it is read; only safetensors are", str(folder), "save it anew with PEFT"
        )
    _tensor_names(folder)


def load_plain_adapter(model: nn.Module, folder: Path, fix: str) -> nn.Module:
    """PEFT's model of a plain LoRA adapter around `model`, whose layers are replaced in place.

    Args:
        fix: what to do where they do not fit.

    Raises:
        UserError: the adapter is not one of this model.
    """
    from peft import PeftModel, get_peft_model_state_dict  # imports bitsandbytes where that is installed

    try:
        with warnings.catch_warnings(action="ignore"):  # that tensors are missing is an error here
            adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"the adapter does not fit the base model: {lines[min(1, len(lines) - 1)].strip()}", str(folder), fix) from error
    own, found = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)), _tensor_names(folder)
    odd = [*sorted(own - found), *sorted(name for name in found - own if "lora_" in name)]
    if odd:
        raise UserError(f"the adapter does not fit the base model: {odd[0]} is in one of them only", str(folder), fix)
    return adapted


def _tensor_names(folder: Path) -> set[str]:
    try:
        with safe_open(folder / TENSORS_FILE, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter's tensors cannot be read: {error}", str(folder / TENSORS_FILE), "copy the folder again") from None
