"""How one tensor of several models becomes one: pure functions, tensors in, a tensor out.

Parameter selection (arXiv 2410.03743, section 4) takes every scalar from one of the models, drawn independently; nothing is computed with
the values, so that none is rounded. The draws are a function of (seed, tensor name, round, place in the tensor) alone: the result is the
same for any division into files, chunks and processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Scalars that are worked on at once. A multiple of 8, the draws that one step of the generator's counter gives. It bounds the temporaries,
# and does not change the result.
CHUNK_SCALARS = 1 << 20
DRAWS_PER_COUNT = 8


class Rule(Protocol):
    def merge(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        """Merges one tensor.

        Args:
            name: of the tensor; random rules draw by it.
            base: the tensor before fine-tuning; of the shape and dtype of the others.
            models: the tensor in each fine-tuned model. It may be one that reads a tensor when it is asked for, so each is asked for once,
                and is let go where the rule does not need all at a time.

        Returns:
            A new tensor of the shape and dtype of the models'.
        """
        ...


@dataclass(frozen=True)
class ParameterSelection:
    """Each scalar j is models[i][j] itself, with i drawn from `probabilities`, independently for every j.

    Args:
        probabilities: one for each model, in their order; they sum to 1.
        resample_rounds: where the model that was drawn equals the base, draw again, at most so many times. It matters where weights are
            stored in few bits and most scalars stay as they were (bfloat16), and does next to nothing in float32.
        seed: of the draws.

    Raises:
        ValueError: these are no probabilities, or `resample_rounds` is negative.
    """

    probabilities: tuple[float, ...]
    resample_rounds: int = 0
    seed: int = 0

    def __post_init__(self):
        if not (self.probabilities and all(p >= 0 for p in self.probabilities) and abs(math.fsum(self.probabilities) - 1) <= 1e-6):
            raise ValueError(f"probabilities are not negative and sum to 1, not {self.probabilities}")
        if self.resample_rounds < 0:
            raise ValueError(f"resample_rounds is not negative, not {self.resample_rounds}")

    def merge(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        if len(models) != len(self.probabilities):
            raise ValueError(f"{len(models)} models and {len(self.probabilities)} probabilities")
        models = list(models)
        merged = torch.empty_like(models[0], memory_format=torch.contiguous_format)
        flat, flat_base, flat_models = merged.view(-1), base.reshape(-1), [model.reshape(-1) for model in models]
        for start in range(0, flat.numel(), CHUNK_SCALARS):
            part = slice(start, start + CHUNK_SCALARS)
            flat[part] = self._chunk(name, start, flat_base[part], [model[part] for model in flat_models])
        return merged

    def _chunk(self, name: str, start: int, base: Tensor, models: list[Tensor]) -> Tensor:
        """Scalars `start`, `start` + 1, ... of the flat tensor; all arguments and the result are [scalars]."""
        chosen = self._select(uniform_integers(self.seed, name, 0, start, base.numel()), models)
        if not self.resample_rounds:
            return chosen
        # Where no model that can be drawn differs from the base, more rounds change nothing.
        reachable = torch.zeros_like(base, dtype=torch.bool)
        for model, probability in zip(models, self.probabilities, strict=True):
            if probability > 0:
                reachable |= model != base
        open_places = ((chosen == base) & reachable).nonzero().squeeze(1)
        for number in range(1, self.resample_rounds + 1):
            if not open_places.numel():
                break
            draws = uniform_integers(self.seed, name, number, start, base.numel())[open_places]
            again = self._select(draws, [model[open_places] for model in models])
            chosen[open_places] = again
            open_places = open_places[again == base[open_places]]
        return chosen

    def _select(self, draws: Tensor, models: list[Tensor]) -> Tensor:
        """`draws`: integers of `uniform_integers`; those below the first model's share of the range choose it, and so on. All are [scalars]."""
        chosen = models[0].clone()
        below, total = 0.0, math.fsum(self.probabilities)  # a sum of 1 - 1e-7 leaves nothing over for a last model of probability 0
        for model, probability in zip(models[1:], self.probabilities, strict=False):
            below += probability / total
            threshold = round(below * 2**32) - 2**31
            if threshold < 2**31:  # else nothing is left for the models that follow
                torch.where(draws >= threshold, model, chosen, out=chosen)
        return chosen


class NormRescaledAverage:
    """The base plus the mean update, scaled for each tensor so that its Euclidean norm is the mean of the models' update norms.

    The plain average shrinks the update: for K updates of equal norm and pairwise cosine rho, to sqrt(rho + (1 - rho) / K) of that norm.
    Where the updates cancel exactly, there is no direction, and the base stays. Computed in float32, or float64 for float64 tensors.
    """

    def merge(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        models = list(models)
        merged = torch.empty_like(models[0], memory_format=torch.contiguous_format)
        flat, flat_base, flat_models = merged.view(-1), base.reshape(-1), [model.reshape(-1) for model in models]
        parts = [slice(start, start + CHUNK_SCALARS) for start in range(0, flat.numel(), CHUNK_SCALARS)]
        norms = [[_norm(update) for update in self._updates(flat_base[part], [model[part] for model in flat_models])] for part in parts]
        *lengths, length = [math.hypot(*of_chunks) for of_chunks in zip(*norms, strict=True)] or [0.0]
        scale = math.fsum(lengths) / len(lengths) / length if length else 0.0
        for part in parts:
            *_, total = self._updates(flat_base[part], [model[part] for model in flat_models])
            flat[part] = torch.add(flat_base[part], total, alpha=scale)
        return merged

    def _updates(self, base: Tensor, models: list[Tensor]) -> list[Tensor]:
        """Of each model, and last their sum. Arguments and results are [scalars]; computed in float32, or in float64."""
        work = torch.promote_types(base.dtype, torch.float32)
        updates = [model.to(work).sub(base.to(work)) for model in models]
        return [*updates, torch.stack(updates).sum(0)]


def _norm(tensor: Tensor) -> float:
    """The Euclidean norm, summed in float64: over 16 million scalars torch's own sum in float32 is off by 7e-4 on the CPU."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def uniform_integers(seed: int, name: str, number: int, start: int, count: int) -> Tensor:
    """Draws `start`, ..., `start` + `count` - 1 of a stream of independent integers, uniform on [-2**31, 2**31).

    The stream is numpy's Philox4x64-10, whose output numpy keeps the same across versions, with the first 128 bits of SHA-256 of
    (seed, name, number) as its key. It is counter-based: any part of it is had without those before. torch's generator on the CPU
    has none of that, and uses 32 bits of its seed only.

    Args:
        number: of the round.
        start: a multiple of `DRAWS_PER_COUNT`.

    Returns:
        [count], int32.
    """
    digest = hashlib.sha256(json.dumps([seed, name, number]).encode()).digest()
    stream = np.random.Philox(counter=start // DRAWS_PER_COUNT, key=int.from_bytes(digest[:16], "little"))
    words = stream.random_raw((count + 1) // 2).astype("<u8", copy=False)
    return torch.from_numpy(words.view("<i4").astype(np.int32, copy=False))[:count]
