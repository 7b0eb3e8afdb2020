"""Which merges are made of the single models. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftcoder_coba.errors import UserError
from mftcoder_coba.merging import METHODS, build_rule

DEFAULT_METHODS = ("linear", "norm_rescaled_average", "parameter_selection")
AVERAGE, SELECTION, RESAMPLED = "average", "selection", "selection, resampled"
ROWS = {"linear": AVERAGE, "parameter_selection": SELECTION}  # others go by the method's name


@dataclass(frozen=True)
class Merge:
    """A merged model.

    Attributes:
        row: what it is called in tables and figures; merges that differ in the seed alone have one.
        name: of its files.
        options: of the method, for `merging.merge`.
    """

    row: str
    name: str
    method: str
    options: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.options.get("seed", 0)

    @property
    def first(self) -> bool:
        """Whether it is the first of its row."""
        return self.seed == 0

    def command(self, base: str, models: Sequence[Path], out: Path) -> str:
        """The command line that makes it, byte for byte."""
        words = ["python", "-m", "mftcoder_coba", "merge", "--base", base]
        words += [word for model in models for word in ("--models", str(model))]
        words += ["--method", self.method]
        words += [word for name, value in self.options.items() for word in ("--" + name.replace("_", "-"), str(value))]
        return shlex.join([*words, "--out", str(out)])


def plan_merges(methods: Sequence[str], models: int, resample_rounds: int, seeds: int) -> list[Merge]:
    """The merges of so many models, in the order of the rows. A method that can resample is there without, and with so many rounds.

    Args:
        methods: names of `merging.METHODS`; none: `DEFAULT_METHODS`.
        seeds: of each method that draws: 0, 1, ...

    Raises:
        UserError: an unknown method, one that cannot merge so many models, numbers out of range.
    """
    if seeds < 1:
        raise UserError(f"there is at least one seed, not {seeds}", "--selection-seeds")
    if resample_rounds < 0:
        raise UserError(f"a number of rounds is not negative, not {resample_rounds}", "--resample-rounds")
    merges = []
    for method in dict.fromkeys(methods or DEFAULT_METHODS):
        build_rule(method, models, {})
        own = METHODS[method].options
        rounds = [0, resample_rounds] if resample_rounds and "resample_rounds" in own else [0]
        for number in rounds:
            row = ROWS.get(method, method)
            row, name = (f"{row}, resampled", f"{method}-resampled{number}") if number else (row, method)
            for seed in range(seeds if "seed" in own else 1):
                options = ({"resample_rounds": number} if number else {}) | ({"seed": seed} if "seed" in own else {})
                merges.append(Merge(row, f"{name}-of-{models}" + (f"-seed{seed}" if "seed" in own else ""), method, options))
    return merges
