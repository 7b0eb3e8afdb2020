"""Full models of one base become one, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging.checking import check_fixed, check_inputs, shared_tensors
from mftcoder_coba.merging.folders import ModelFolder, dtype_name, local_folder
from mftcoder_coba.merging.provenance import CONFIG_FILES, copy_files, copy_tokenizer, set_dtype, write_provenance
from mftcoder_coba.merging.rules import Rule
from mftcoder_coba.merging.writing import merged_folder, write_weights


def merge_full_models(
    base: str, folders: Sequence[Path], rule: Rule, method: str, options: dict[str, Any], out: Path, dtype: str | None, max_shard_bytes: int
) -> list[str]:
    """Writes the merged model to `out`. In memory is one tensor at a time: of the base, of each model, and the merged one.

    Args:
        base: a Hugging Face folder or hub id.
        folders: of the models.
        rule, method, options: what merges, its name, and its complete options.
        dtype: of the merged model; None: the models' own.

    Returns:
        What was written, for people.

    Raises:
        UserError: they cannot be merged so, or `out` is not empty or cannot be written; then nothing is left there.
    """
    models = [ModelFolder(folder) for folder in folders]
    origin = ModelFolder(local_folder(base))
    check_inputs(origin, models)
    check_fixed(models)
    wanted = getattr(torch, dtype) if dtype else None
    stored = models[0].tensors
    kinds = {name: wanted if wanted and tensor.dtype.is_floating_point else tensor.dtype for name, tensor in stored.items()}
    leaders = shared_tensors([origin, *models])

    def merged(name: str) -> Tensor:
        return _finite(name, _merged(name, leaders.get(name, name), origin, models, rule, wanted), models)

    with merged_folder(out) as (new, begin):
        write_provenance(new, method, options, origin.path, folders, begin, dtype=dtype)
        sources = [folders[0], origin.path]
        copy_files(new, sources, CONFIG_FILES)
        copy_tokenizer(new, sources)
        if wanted:
            set_dtype(new / "config.json", wanted)
        write_weights(new, stored, kinds, merged, max_shard_bytes, begin)
    return _lines(origin, models, kinds, method, out)


def _merged(name: str, key: str, base: ModelFolder, models: list[ModelFolder], rule: Rule, dtype: torch.dtype | None) -> Tensor:
    """The merged tensor. Random rules draw by `key`. Numbers are rounded once: what is wanted in more bits is computed in them."""
    stored = models[0].tensors[name].dtype
    if not stored.is_floating_point:
        return models[0].read(name)
    work = torch.promote_types(stored, dtype) if dtype else stored
    origin = base.read(name).to(stored).to(work)  # training started from the base in the models' dtype
    return rule.merge(key, origin, _Tensors(name, models, work)).to(dtype or stored)


@dataclass(frozen=True)
class _Tensors(Sequence):
    """A tensor in each model, read when it is asked for."""

    name: str
    models: list[ModelFolder]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, index: int) -> Tensor:
        return self.models[index].read(self.name).to(self.dtype)


def _finite(name: str, merged: Tensor, models: list[ModelFolder]) -> Tensor:
    """`merged`. Raises UserError where it holds numbers that are not finite, and says which model brought them."""
    if merged.is_floating_point() and not merged.isfinite().all():
        source = next((model.path for model in models if not model.read(name).isfinite().all()), None)
        if source:
            raise UserError(f"{name} holds numbers that are not finite", str(source), "take the model of an earlier step")
        raise UserError(f"the merged {name} has numbers that are not finite", "--dtype", "choose a dtype of a wider range, or other options")
    return merged


def _lines(base: ModelFolder, models: list[ModelFolder], kinds: dict[str, torch.dtype], method: str, out: Path) -> list[str]:
    stored = models[0].tensors
    scalars = sum(math.prod(tensor.shape) for tensor in stored.values())
    names = ", ".join(sorted({dtype_name(kind) for kind in kinds.values()}))
    of = f"{len(models)} models" if len(models) > 1 else "1 model"
    lines = [f"wrote {out}: {scalars / 1e6:,.1f} M parameters in {len(stored)} tensors, {names}; {method} of {of}"]
    pairs = sorted({(dtype_name(base.tensors[name].dtype), dtype_name(tensor.dtype)) for name, tensor in stored.items()})
    return [*lines, *(f"the base is stored in {old}; taken as {new}, as the models are" for old, new in pairs if old != new)]
