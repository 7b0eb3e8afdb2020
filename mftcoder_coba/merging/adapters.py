"""Plain LoRA adapters of one base model, merged into a full model, or into one LoRA adapter of a given rank.

Merged are the updates s B A of the weights, never A and B: their product is what an adapter does, and scalars of A from one adapter
with scalars of B from another make products that no adapter has. A layer that an adapter leaves out has the update 0 in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging.checking import check_tokenizers
from mftcoder_coba.merging.folders import ModelFolder, local_folder
from mftcoder_coba.merging.lora_updates import LoraUpdates, empty_model, read_updates, shared_parameters
from mftcoder_coba.merging.provenance import CONFIG_FILES, copy_files, copy_tokenizer, write_provenance
from mftcoder_coba.merging.rules import Rule
from mftcoder_coba.merging.svd import factorise, squared_norm
from mftcoder_coba.merging.writing import Begin, merged_folder, write_weights
from mftcoder_coba.models.cgc_lora.per_task import write_task_adapter

LAYERS_TOLD = 5


def merge_adapters(
    base: str,
    adapters: Sequence[Path],
    rule: Rule,
    method: str,
    options: dict[str, Any],
    out: Path,
    rank: int | None,
    max_shard_bytes: int,
) -> list[str]:
    """Writes the merged adapters to `out`. In memory are the updates of one weight at a time: one for each adapter, and the merged one.

    Args:
        base: the model that the adapters were trained on: a Hugging Face folder or hub id.
        adapters: folders of plain PEFT LoRA adapters.
        rule, method, options: what merges the updates (the base is zero there, and weights are named as in the model), its name, and its
            complete options.
        rank: of the LoRA adapter to write, the nearest of that rank to the merged updates; None: a full model.

    Returns:
        What was written, for people.

    Raises:
        UserError: the adapters cannot be merged so, or `out` is not empty or cannot be written; then nothing is left there.
    """
    folder = ModelFolder(local_folder(base))
    updates = read_updates(folder.path, adapters)
    check_tokenizers([*adapters, folder.path])
    model = empty_model(folder.path)
    layers = [name for name, _ in model.named_modules() if any(name in adapter.layers for adapter in updates)]
    stored: dict[str, str] = {}
    if rank is None:
        stored = _stored_weights(folder, model, layers)
    else:
        _check_rank(rank, model, layers)
    with merged_folder(out) as (new, begin):
        if rank is None:
            copy_files(new, [folder.path], CONFIG_FILES)
            more: dict[str, Any] = {}
            _write_model(new, folder, stored, updates, rule, max_shard_bytes, begin)
            lines = [f"full model with {len(updates)} adapters merged into {len(stored)} weights"]
        else:
            named = str(Path(base).absolute()) if Path(base).is_dir() else base
            errors, total = _write_adapter(new, model, named, layers, updates, rule, rank, begin)
            more = {"rank": rank, "relative_error": total, "relative_error_of_layers": errors}
            what = f"LoRA adapter of rank {rank} on {len(layers)} layers, from {len(updates)} adapters"
            lines = [what, *_error_lines(errors, total)]
        copy_tokenizer(new, [*adapters, folder.path])
        write_provenance(new, method, options, folder.path, adapters, begin, **more)
    return [f"wrote {out}: {lines[0]}; {method}", *lines[1:]]


def merged_update(rule: Rule, layer: str, shape: Sequence[int], updates: Sequence[LoraUpdates]) -> Tensor:
    """The merged update of the layer's weight, float32, of `shape`, which is the weight's."""
    none = torch.zeros(*shape)
    merged = rule.merge(f"{layer}.weight", none, [adapter.update(layer) if layer in adapter.layers else none for adapter in updates])
    if not merged.isfinite().all():
        raise UserError(f"the merged update of {layer} has numbers that are not finite", "--method", "choose other options of the method")
    return merged


def _check_rank(rank: int, model: nn.Module, layers: Sequence[str]) -> None:
    most = max(min(model.get_submodule(layer).weight.shape) for layer in layers)
    if not 1 <= rank <= most:
        raise UserError(f"the rank is {rank}; the adapted weights allow 1 to {most}", "--rank")


def _stored_weights(folder: ModelFolder, model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Name of the stored weight -> the adapted layer that it is of.

    Raises:
        UserError: a weight is not stored so, or it is shared with another layer, which must not change with it.
    """
    found = {}
    shared = shared_parameters(model)
    for layer in layers:
        name = f"{layer}.weight"
        if name in shared:
            what = f"{layer} is adapted, and shares its weight with another layer of the base model: they cannot both be right after merging"
            raise UserError(what, str(folder.path), "write a LoRA adapter: add --rank")
        # Files of a model without its output layer, as GPT-2's, leave out the first part of the names.
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        name = name if name in folder.tensors else bare
        shape = model.get_submodule(layer).weight.shape
        if name not in folder.tensors or folder.tensors[name].shape != tuple(shape):
            is_there = f"is {list(folder.tensors[name].shape)}" if name in folder.tensors else "is missing"
            raise UserError(f"{layer}.weight {is_there} in the base model's files; config.json says {list(shape)}", str(folder.path))
        if folder.tensors[name].dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            what = f"{name} is stored as {folder.tensors[name].dtype}: updates cannot be added to it"
            raise UserError(what, str(folder.path), "name the base model as it was before it was quantised")
        found[name] = layer
    return found


def _write_model(
    new: Path, folder: ModelFolder, stored: dict[str, str], updates: Sequence[LoraUpdates], rule: Rule, max_shard_bytes: int, begin: Begin
) -> None:
    def merged(name: str) -> Tensor:
        weight = folder.read(name)
        return _sum(weight, merged_update(rule, stored[name], weight.shape, updates), name) if name in stored else weight

    kinds = {name: tensor.dtype for name, tensor in folder.tensors.items()}
    write_weights(new, folder.tensors, kinds, merged, max_shard_bytes, begin)


def _sum(weight: Tensor, update: Tensor, name: str) -> Tensor:
    """Rounded once, to the weight's dtype."""
    total = update.add_(weight).to(weight.dtype) if weight.dtype != torch.float64 else weight + update
    if not total.isfinite().all():
        raise UserError(f"the merged {name} has numbers that are not finite", "--base", "merge into the base model in float32")
    return total


def _write_adapter(
    new: Path, model: nn.Module, base: str, layers: Sequence[str], updates: Sequence[LoraUpdates], rule: Rule, rank: int, begin: Begin
) -> tuple[dict[str, float], float]:
    """Gives the relative error of each layer, and that of all of them together."""
    shapes = {layer: model.get_submodule(layer).weight.shape for layer in layers}
    advance = begin("merging", sum(4 * shape.numel() for shape in shapes.values()))
    factors, errors = {}, {}
    whole = lost = 0.0
    for layer, shape in shapes.items():
        update = merged_update(rule, layer, shape, updates)
        transposed = next(adapter.layers[layer][1] for adapter in updates if layer in adapter.layers)
        matrix = update.T if transposed else update  # [out, in], as PEFT has it
        factors[layer] = down, up = factorise(matrix, rank)
        size, rest = squared_norm(matrix), squared_norm(torch.addmm(matrix, up, down, alpha=-1))
        errors[layer] = math.sqrt(rest / size) if size else 0.0
        whole, lost = whole + size, lost + rest
        advance(4 * shape.numel())
    write_task_adapter(new, factors, layers, model, base)
    return errors, math.sqrt(lost / whole) if whole else 0.0


def _error_lines(errors: dict[str, float], total: float) -> list[str]:
    worst = sorted(errors, key=errors.get, reverse=True)[:LAYERS_TOLD]
    return [
        f"relative error ||dW - BA|| / ||dW||: {total:.3g} in total, {statistics.median(errors.values()):.3g} in the median layer; largest:",
        *(f"  {errors[layer]:.3g}  {layer}" for layer in worst),
    ]
