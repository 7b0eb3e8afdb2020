"""Tiny models with low-rank experts whose values are all random, and plain PEFT models of one of their tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn

from mftcoder_coba.config import CgcLoraConfig
from mftcoder_coba.models import CgcLoraModel, add_adapter

# Two clusters, one with a dot in all its names.
CLUSTERS = {"code.v1": ["a.b", "c"], "qa": ["math"]}
TASKS = ["math", "a.b", "c"]  # as numbered in batches: not in the order of the clusters


def experts_config(clusters: dict[str, list[str]] = CLUSTERS, **changes) -> CgcLoraConfig:
    return CgcLoraConfig(**{"kind": "cgc_lora", "clusters": clusters, "rank": 16, "alpha": 24.0, "dropout": 0.0} | changes)


def experts_model(config=None, tasks: Sequence[str] = TASKS, architecture: str = "llama", base: nn.Module | None = None, **changes) -> CgcLoraModel:
    """With random B, gates and embeddings, unless an initial adapter is named; A is random anyway."""
    config = experts_config() if config is None else config
    model = add_adapter(tiny_model(architecture, **changes) if base is None else base, config, tasks)
    if config.initial_adapter is None:
        randomise(model)
    return model


def randomise(model: CgcLoraModel, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in model.adapter_names():
            parameter = model.get_parameter(name)
            if not part_of(name).startswith("A:"):
                std = 0.1 if part_of(name).startswith("B:") else 0.7
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def part_of(name: str) -> str:
    """A parameter's own name, without its module's."""
    return name.rpartition(".")[2]


def layer_parts(model: CgcLoraModel, layer: str, task: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of all experts that a task sees, in one layer."""
    cluster = next(cluster for cluster in model.structure.clusters if task in cluster.tasks)
    module = model.base_model.get_submodule(layer)
    groups = [group for group in (cluster.name, f"{cluster.name}:{task}") if f"A:{group}".replace(".", "/") in module._parameters]
    down, up = ([module._parameters[f"{kind}:{group}".replace(".", "/")] for group in groups] for kind in "AB")
    return torch.cat(down), torch.cat(up, dim=1)


def gates_by_hand(model: CgcLoraModel, task: str) -> np.ndarray:
    """[layers, experts] float64: softmax(W e), from the stored numbers alone."""
    stored = {name: parameter.detach().double().numpy() for name, parameter in model.gates.named_parameters()}
    safe = task.replace(".", "/")
    exponents = np.exp(np.einsum("lew,w->le", stored[f"gate:{safe}"], stored[f"embedding:{safe}"]))
    return exponents / exponents.sum(axis=1, keepdims=True)


def plain_lora(model: CgcLoraModel, task: str, architecture: str = "llama", gates: np.ndarray | None = None) -> nn.Module:
    """PEFT's LoRA of what a task sees, with its gates in B. gates: [layers, experts]; None: by hand."""
    cluster = next(cluster for cluster in model.structure.clusters if task in cluster.tasks)
    ranks = [*cluster.common, *cluster.tasks[task]]
    gates = gates_by_hand(model, task) if gates is None else gates
    config = LoraConfig(r=sum(ranks), lora_alpha=sum(ranks), lora_dropout=0.0, target_modules=list(model.layer_names), task_type="CAUSAL_LM")
    plain = get_peft_model(tiny_model(architecture), config)
    with torch.no_grad():
        for index, layer in enumerate(model.layer_names):
            down, up = layer_parts(model, layer, task)
            module = plain.get_base_model().get_submodule(layer)
            module.lora_A["default"].weight.copy_(down)
            module.lora_B["default"].weight.copy_(up.double() * torch.from_numpy(np.repeat(gates[index], ranks) * cluster.scaling))
    return plain


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """The largest difference is at most `relative` times the largest number that is expected, which is not zero."""
    scale, difference = expected.abs().max().item(), (actual - expected).abs().max().item()
    assert scale > 0, "nothing to compare"
    assert difference <= relative * scale, f"{difference / scale:.2e} relative"


def token_ids(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
    """A sum over rows, so that rows may be computed apart."""
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)[chosen].sum()
