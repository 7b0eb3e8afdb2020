"""One task of an adapter with experts as a plain LoRA adapter, its gates folded into B.

    B diag(s g_t) A  =  B' A'     A': the rows of A that task t sees, B': the columns of B that it sees, each times s g_t

The scaling of the plain adapter is 1 (alpha = rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mftcoder_coba.models.cgc_lora.gates import TaskGates
from mftcoder_coba.models.cgc_lora.layer import tensor_names
from mftcoder_coba.models.cgc_lora.structure import Structure


def task_tensors(structure: Structure, layers: Sequence[str], tensors: dict[str, Tensor], task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A' [rank, in], B' [out, rank]) of a task, of the dtype of the adapter's tensors.

    Args:
        layers: names of all adapted layers, in their order.
        tensors: the adapter's, by their names in the model.

    Raises:
        UserError: an unknown task.
    """
    gates = TaskGates(structure, len(layers))
    for name, parameter in gates.named_parameters():
        parameter.data = tensors[f"gates.{name}"]
    groups = structure.visible_groups(task)
    seen = [column for group in groups for column in range(group.first, group.first + group.rank)]
    with torch.no_grad():
        factors = gates([task])[:, 0, seen].double()  # [layers, rank]
    found = {}
    for layer, factor in zip(layers, factors, strict=True):
        pairs = [[tensors[f"base_model.{layer}.{name}"] for name in tensor_names(group.name)] for group in groups]
        down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
        found[layer] = (down, (up.double() * factor).to(up.dtype))
    return found


def write_task_adapter(folder: Path, tensors: dict[str, tuple[Tensor, Tensor]], layers: Sequence[str], model: nn.Module, base: str) -> None:
    """Writes what `task_tensors` gave as a PEFT adapter. model: the base model; base: its name or path.

    Raises:
        OSError: the folder cannot be written.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(tensors.values()))[0].shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=_targets(layers, model), bias="none", task_type="CAUSAL_LM", inference_mode=True
    )
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    named = {}
    for layer, (down, up) in tensors.items():
        named[f"base_model.model.{layer}.lora_A.weight"] = down.contiguous()
        named[f"base_model.model.{layer}.lora_B.weight"] = up.contiguous()
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _targets(layers: Sequence[str], model: nn.Module) -> list[str]:
    """The last parts of the layers' names, as servers want them, if they mean these layers alone; else whole names."""
    endings = sorted({layer.rpartition(".")[2] for layer in layers})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return endings if meant == set(layers) else sorted(layers)
