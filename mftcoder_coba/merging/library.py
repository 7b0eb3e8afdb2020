"""Merging rules of the mergekit library (pinned in requirements.txt): its own functions for one tensor, in float32."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.sparsify import RescaleNorm, sparsify
from torch import Tensor

RANDOM = ("dare_linear", "dare_ties")
SPARSE = ("ties", *RANDOM)
WITHOUT_BASE = ("linear",)
LIBRARY_METHODS = ("linear", "task_arithmetic", *SPARSE, "model_stock")
CHUNK_SCALARS = 1 << 20  # it bounds the memory, and does not change the result


@dataclass(frozen=True)
class LibraryRule:
    """A method of mergekit.

    Args:
        method: one of `LIBRARY_METHODS`.
        parameters: in mergekit's names; a tuple has a value for each model. `weight` is needed by all but model_stock; `density` is one number.
        seed: of DARE's masks, which follow (seed, tensor name).
    """

    method: str
    parameters: dict[str, float | tuple[float, ...]]
    seed: int = 0

    def merge(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        if self.method in SPARSE:
            return self._merge_sparse(name, base, models)
        if self.method == "model_stock":
            return self._merge_model_stock(base, list(models))
        return self._in_chunks(base, list(models), self.parameters)

    def _merge_sparse(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        """Sparsifying takes a whole tensor, of one model after the other; what follows is element-wise, on updates of the base zero.

        It is mergekit's own order of operations: the same to the bit as by its function for a whole tensor, in half the memory.
        """
        theirs = merge_methods.get(self.method)
        settings = {"method": theirs.sparsification_method, "rescale_norm": RescaleNorm.l1 if theirs.default_rescale else None}
        density = self.parameters.get("density", 1.0)
        work = torch.promote_types(base.dtype, torch.float32)
        origin = base.to(work)
        with torch.random.fork_rng(devices=[], enabled=self.method in RANDOM):
            if self.method in RANDOM:  # mergekit draws from torch's generator of the CPU, which uses 32 bits of a seed
                digest = hashlib.sha256(json.dumps([self.seed, name]).encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(digest[:4], "little"))
            updates = [sparsify(model.to(work).sub(origin), density, **settings) for model in models]
        merged = self._in_chunks(torch.zeros((), dtype=work), updates, self.parameters | {"density": 1.0})
        return merged.add_(origin).to(base.dtype)

    def _merge_model_stock(self, base: Tensor, models: list[Tensor]) -> Tensor:
        """The result lies at base + t * (mean update), and t depends on the inner products of the updates alone (arXiv 2403.19522).

        mergekit is given vectors of K numbers with the same products, and t is read off its result: for the whole tensor it would need
        twice the memory. The products are summed in float64.
        """
        work = torch.promote_types(base.dtype, torch.float32)
        merged = torch.empty_like(base, memory_format=torch.contiguous_format)
        flat, flat_base, flat_models = merged.view(-1), base.reshape(-1), [model.reshape(-1) for model in models]
        parts = [slice(start, start + CHUNK_SCALARS) for start in range(0, flat.numel(), CHUNK_SCALARS)]

        def updates(part: slice) -> Tensor:  # [models, scalars]
            return torch.stack([model[part].to(work).sub(flat_base[part]) for model in flat_models])

        products = torch.zeros(len(models), len(models), dtype=torch.float64)
        for part in parts:
            of_part = updates(part).double()
            products += of_part @ of_part.T
        values, vectors = torch.linalg.eigh(products)
        alike = vectors * values.clamp_min(0).sqrt()  # [models, models]; alike @ alike.T = products
        mean = alike.mean(0)
        squared = mean.dot(mean).item()
        t = self._merge(torch.zeros_like(mean), list(alike), self.parameters).dot(mean).item() / squared if squared else 0.0
        for part in parts:
            flat[part] = updates(part).mean(0).mul_(t).add_(flat_base[part])
        return merged

    def _in_chunks(self, base: Tensor, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
        """`base` is of the models' shape, or one number for all. The result has the dtype of the models."""
        merged = torch.empty_like(models[0], memory_format=torch.contiguous_format)
        flat, flat_models = merged.view(-1), [model.reshape(-1) for model in models]
        flat_base = base.expand(flat.shape) if not base.ndim else base.reshape(-1)
        for start in range(0, flat.numel(), CHUNK_SCALARS):
            part = slice(start, start + CHUNK_SCALARS)
            flat[part] = self._merge(flat_base[part], [model[part] for model in flat_models], parameters)
        return merged

    def _merge(self, base: Tensor, models: list[Tensor], parameters: dict[str, Any]) -> Tensor:
        """By mergekit, in float32 or float64."""
        with_base = self.method not in WITHOUT_BASE
        return merge_methods.merge_tensors(
            [base, *models] if with_base else models,
            self.method,
            parameters=parameters,
            base_index=0 if with_base else None,
            dtype=torch.promote_types(base.dtype, torch.float32),
        )
