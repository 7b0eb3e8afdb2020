"""Plain LoRA adapters read as what they do: each adds s B A to the weights of some layers of one base model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models.architecture import read_architecture, without_weights
from mftcoder_coba.models.cgc_lora.model import CONFIG_FILE, PEFT_TYPE, TENSORS_FILE
from mftcoder_coba.models.exported import adapter_config, check_plain_adapter, exported_folder, load_plain_adapter

PREFIX = "base_model.model."  # PEFT's, before the names of the layers
# Keys of an adapter's config that change nothing in s B A, or that PEFT's layers account for. All others have to be as in a new LoraConfig.
PLAIN_KEYS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "qalora_group_size"),
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base model as it is
MERGE_FULL_MODELS = "merge each adapter into the base model with PEFT (merge_and_unload), and merge these full models"


@dataclass(frozen=True)
class LoraUpdates:
    """The updates of one adapter.

    Args:
        folder: the adapter's.
        layers: name in the model of each adapted layer -> its scaling s, and whether its weight is stored as [in, out] (GPT-2's Conv1D).
    """

    folder: Path
    layers: dict[str, tuple[float, bool]]

    def update(self, layer: str) -> Tensor:
        """What the adapter adds to the weight of one of its layers, of the weight's shape, float32.

        Raises:
            UserError: it holds numbers that are not finite.
        """
        with safe_open(self.folder / TENSORS_FILE, "pt") as file:
            down, up = (file.get_tensor(f"{PREFIX}{layer}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
        scaling, transposed = self.layers[layer]
        update = up @ down
        update *= scaling
        if not update.isfinite().all():
            raise UserError(f"the update of {layer} has numbers that are not finite", str(self.folder), "take an adapter of an earlier step")
        return update.T.contiguous() if transposed else update


def read_updates(base: Path, adapters: Sequence[Path]) -> list[LoraUpdates]:
    """The adapters' updates of one base model; of their tensors, nothing stays in memory.

    Args:
        base: a Hugging Face folder.
        adapters: folders of plain PEFT LoRA adapters, or of runs that exported such.

    Raises:
        UserError: an adapter cannot be read, is of another kind, or is not one of this base model; they were trained on different models.
    """
    folders = [exported_folder(adapter) for adapter in adapters]
    configs = [_plain_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if _base_of(config) != _base_of(configs[0]):
            names = [" at ".join(filter(None, _base_of(each))) for each in (configs[0], config)]
            raise UserError(
                f"the adapters were trained on different base models: {names[0]}, and {names[1]}",
                f"{folders[0]}, {folder}",
                f"merge adapters of one base model; if it is the same one in two places, write one path into {CONFIG_FILE} of both",
            )
    return [_read(base, folder) for folder in folders]


def empty_model(base: Path) -> nn.Module:
    """The base model without weights: its parameters have shapes alone (torch's meta device).

    Raises:
        UserError: there is none that adapters can be merged into.
    """
    fix = "give a Hugging Face folder with the config.json of a causal language model"
    architecture = read_architecture(str(base), str(base), fix, allow_code=MERGE_FULL_MODELS)
    if getattr(architecture, "quantization_config", None) is not None:
        what = "the weights of this model are quantised: updates cannot be added to them"
        raise UserError(what, str(base), "name the base model as it was before; adapters that were trained in 4 bits are merged into that one")
    return without_weights(architecture, "eager", torch.float32, str(base))


def shared_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that have several of them (tied weights)."""
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    return {name for name, parameter in named if uses[id(parameter)] > 1}


def _plain_config(folder: Path) -> dict[str, Any]:
    """The adapter's config. Raises UserError where the adapter is more than s B A on some weights."""
    from peft import LoraConfig  # takes seconds to import, and imports bitsandbytes where that is installed

    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"is a full model, without {CONFIG_FILE}", str(folder), "give adapters only, or full models only")
    config = adapter_config(folder)
    if config.get("peft_type") == PEFT_TYPE:
        fix = "write each task's plain LoRA adapter with the command export, and merge those of one task"
        raise UserError("is an adapter with experts, whose gates differ for each task", str(folder), fix)
    check_plain_adapter(folder)
    usual = LoraConfig().to_dict()
    for key, value in config.items():
        plain = value in PLAIN_STARTS if key == "init_lora_weights" else key in PLAIN_KEYS or value == usual.get(key) or not (value or usual.get(key))
        if not plain:
            what = f"{key} is {value!r}: such an adapter does more than to add s B A to weights"
            raise UserError(what, str(folder / CONFIG_FILE), MERGE_FULL_MODELS)
    return config


def _base_of(config: dict[str, Any]) -> tuple[str, str]:
    """Name and revision of the model that an adapter was trained on."""
    name = config.get("base_model_name_or_path") or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name, config.get("revision") or ""


def _read(base: Path, folder: Path) -> LoraUpdates:
    """PEFT tells which layers it adapts, and how; it checks names and shapes of the tensors on a model without weights."""
    from peft.tuners.lora import Linear, LoraLayer

    with warnings.catch_warnings(action="ignore"):
        adapted = load_plain_adapter(empty_model(base), folder, "name the base model that it was trained on")
    layers = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            if not isinstance(module, Linear):
                kind = type(module.get_base_layer()).__name__
                raise UserError(f"adapts {name}, which is {kind}, no linear layer", str(folder), MERGE_FULL_MODELS)
            layers[name] = (float(module.scaling["default"]), module.fan_in_fan_out)
    known = {f"{PREFIX}{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")}
    with safe_open(folder / TENSORS_FILE, "pt") as file:
        strangers = sorted(set(file.keys()) - known)
    if strangers:
        raise UserError(f"holds {strangers[0]}, which is no part of s B A", str(folder / TENSORS_FILE), MERGE_FULL_MODELS)
    return LoraUpdates(folder, layers)
