"""Adapters: LoRA through PEFT, and low-rank experts on the layers that PEFT's LoRA would adapt. Without one, all parameters are trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mftcoder_coba.config import AdapterConfig, ExpertsConfig, LowRankConfig
from mftcoder_coba.errors import UserError, suggestion
from mftcoder_coba.models.cgc_lora import CgcLoraModel, read_adapter, structure_of
from mftcoder_coba.models.cgc_lora.structure import clusters_of
from mftcoder_coba.models.quantisation import check_quantisation, full_size


def check_adapter(config: AdapterConfig | None, tasks: Sequence[str], deepspeed_config: dict[str, Any]) -> None:
    """To be called before anything is loaded.

    Raises:
        UserError: what the adapter asks for does not fit the tasks or the initial adapter, or cannot run here.
    """
    if config is not None:
        check_quantisation(config, deepspeed_config)
    if isinstance(config, ExpertsConfig):
        earlier = read_adapter(Path(config.initial_adapter))[0] if config.initial_adapter else None
        structure_of(config, tasks, earlier)


def add_adapter(model: nn.Module, config: AdapterConfig | None, tasks: Sequence[str] = ()) -> nn.Module:
    """The model with an adapter whose parameters alone are trained; the model itself where `config` is None.

    Args:
        tasks: names of the tasks that are numbered in batches; needed for experts.

    Raises:
        UserError: `target_modules` names nothing in this model; experts, clusters and tasks do not fit together.
    """
    if config is None:
        return model
    if isinstance(config, ExpertsConfig):
        return _with_experts(model, config, tasks)
    from peft import get_peft_model  # takes seconds to import, and imports bitsandbytes where that is installed

    with _explained(model, config):
        return get_peft_model(model, _lora(config, config.rank))


def adapter_names(model: nn.Module) -> list[str] | None:
    """Names in the model of what makes up its adapter; None where there is none, and the whole model is trained."""
    if isinstance(model, CgcLoraModel):
        return model.adapter_names()
    if not hasattr(model, "peft_config"):
        return None
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Total and trainable numbers of parameters; one of 4 bits counts as one."""
    total = trainable = 0
    for parameter in model.parameters():
        size = full_size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


def _with_experts(model: nn.Module, config: ExpertsConfig, tasks: Sequence[str]) -> CgcLoraModel:
    """Fresh experts, or those of `config.initial_adapter` with what the config adds to them."""
    earlier, names, tensors = read_adapter(Path(config.initial_adapter)) if config.initial_adapter else (None, None, {})
    structure = structure_of(config, tasks, earlier)
    layers = _adapted_layers(model, config)
    if names is not None and names != list(layers):
        what = f"the initial adapter has {len(names)} layers, the config asks for {len(layers)} (or for others)"
        raise UserError(what, f"adapter.initial_adapter = {config.initial_adapter}", "use its base model and target_modules")
    result = CgcLoraModel(model, structure, layers, config.dropout, tasks)
    result.load_tensors(tensors)
    _freeze_the_rest(result, config, tasks)
    return result


def _adapted_layers(model: nn.Module, config: ExpertsConfig) -> dict[str, tuple[int, int, torch.device]]:
    """The linear layers that PEFT's LoRA adapts: name -> (in features, out features, device of its adapter). The model stays as it was."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with _explained(model, config):
        inject_adapter_in_model(_lora(config, 1), model)
    found = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    for name, layer in layers.items():
        if "default" not in layer.lora_A or not isinstance(layer.lora_A["default"], nn.Linear):  # of an embedding, of a convolution
            what = f"{name} is {type(layer.get_base_layer()).__name__}, no linear layer"
            raise UserError(what, f"adapter.target_modules = {config.target_modules!r}", "experts are for linear layers: leave it out")
        found[name] = (layer.in_features, layer.out_features, layer.lora_A["default"].weight.device)
    return found


def _freeze_the_rest(model: CgcLoraModel, config: ExpertsConfig, tasks: Sequence[str]) -> None:
    """Leaves trainable what `trained` names, else the clusters of the config; never what belongs to a task without data: weight decay
    alone would move it."""
    clusters = {cluster.name: cluster for cluster in model.structure.clusters}
    known = [*clusters, *(f"{cluster.name}/{task}" for cluster in clusters.values() for task in cluster.tasks)]
    for name in model.adapter_names():
        model.get_parameter(name).requires_grad_(False)
    for name in config.trained or clusters_of(config, tasks):
        cluster, _, task = name.partition("/")
        if name not in known:
            raise UserError(f"names {name}; {suggestion(name, known)}", "adapter.trained", "name clusters, or CLUSTER/TASK")
        if task and task not in tasks:
            raise UserError(f"names {name}, but data.tasks has no {task}", "adapter.trained", "add the task's data, or leave it out")
        members = [task] if task else [member for member in clusters[cluster].tasks if member in tasks]
        parameters = [parameter for member in members for parameter in model.own_parameters(member)]
        parameters += [] if task else model.common_parameters(cluster)
        if not parameters:
            raise UserError(f"{name} has no parameters of its own", "adapter.trained", "name its cluster")
        for parameter in parameters:
            parameter.requires_grad_(True)
    seen = {task: model.own_parameters(task) + model.common_parameters(model.structure.cluster_of(task).name) for task in tasks}
    asleep = [task for task, parameters in seen.items() if not any(parameter.requires_grad for parameter in parameters)]
    if asleep:
        what = f"data.tasks has {', '.join(asleep)}, but nothing that such a task sees is trained"
        raise UserError(what, "adapter.trained", "take the task out of data.tasks, or name it or its cluster here")


def _lora(config: LowRankConfig, rank: int):
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def _explained(model: nn.Module, config: LowRankConfig) -> Iterator[None]:
    """Turns PEFT's complaint about `target_modules` into a message that names what there is."""
    # Taken before PEFT has put layers of its own into the model.
    names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    try:
        yield
    except (ValueError, re.error) as error:
        if isinstance(error, re.error):
            what = f"is no regular expression: {error}"
        else:  # without the printed module, which has many lines
            what = re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL).splitlines()[0]
        raise UserError(what, f"adapter.target_modules = {config.target_modules!r}", f"linear layers of this model: {', '.join(names)}") from error
