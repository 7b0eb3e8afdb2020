"""Where the layers of a model are: one behind another, several kinds of linear layers at each depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """Kinds x depths. A layer's depth is the first number in its name, and the rest of the name is its kind; further numbers, such as
    those of the experts of a mixture-of-experts model, make no kinds of their own. A layer without a number is at the depth 0."""

    kinds: list[str]  # as short as tells them apart, in the model's order
    depths: list[int]  # ascending
    places: NDArray[np.int64]  # [layers, 2]: number of the kind, number of the depth

    @classmethod
    def of(cls, layers: Sequence[str]) -> Grid:
        found = [_kind_and_depth(layer) for layer in layers]
        kinds = list(dict.fromkeys(kind for kind, _ in found))
        depths = sorted({depth for _, depth in found})
        kind_numbers, depth_numbers = ({item: number for number, item in enumerate(items)} for items in (kinds, depths))
        return cls(_short(kinds), depths, np.array([(kind_numbers[kind], depth_numbers[depth]) for kind, depth in found]))

    def spread(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[layers, columns] -> [columns, kinds, depths]: the mean of the layers at a place, NaN where there is none."""
        sums = np.zeros((len(self.kinds), len(self.depths), values.shape[1]))
        counts = np.zeros_like(sums)
        kinds, depths = self.places.T
        np.add.at(sums, (kinds, depths), np.nan_to_num(values))
        np.add.at(counts, (kinds, depths), np.isfinite(values))
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0).transpose(2, 0, 1)


def _kind_and_depth(layer: str) -> tuple[tuple[str, ...], int]:
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts) if re.fullmatch("[0-9]{1,9}", part)]
    kind = tuple("*" if place in numbers else part for place, part in enumerate(parts))
    return kind, int(parts[numbers[0]]) if numbers else 0


def _short(kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each, or the whole name where two have the same one."""
    ends = [kind[-1] for kind in kinds]
    return [end if ends.count(end) == 1 else ".".join(kind) for kind, end in zip(kinds, ends, strict=True)]
