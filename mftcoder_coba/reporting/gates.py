"""The gates of an adapter with experts, as one validation recorded them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIGHEST = 1.001  # a gate is at most 1, but for rounding


@dataclass(frozen=True)
class Gates:
    """For each task the experts that it sees, common ones first, and how much of each its gate lets through in each layer.

    Common experts are named "CLUSTER i", a task's own ones "TASK i"; i counts from 1 for both.
    """

    step: int
    layers: list[str]
    experts: dict[str, list[str]]  # task -> names
    values: dict[str, NDArray[np.float64]]  # task -> [layers, experts], each row sums to 1; NaN where the record has null

    def common(self, task: str) -> int:
        """How many of the task's experts are common ones. A cluster may have the task's name: then its experts are counted first."""
        names = self.experts[task]
        starts = [place for place, name in enumerate(names) if name == f"{task} 1"]
        return starts[-1] if starts else len(names)

    def cluster(self, task: str) -> str:
        """Empty where the task has no common experts to tell it."""
        return self.experts[task][0].rpartition(" ")[0] if self.common(task) else ""

    def has_both_kinds(self, task: str) -> bool:
        return 0 < self.common(task) < len(self.experts[task])

    def common_share(self, task: str) -> float:
        """What the gate gives to all common experts together, in 0..1: the mean over the layers. NaN where no layer has a whole gate."""
        shares = self.values[task][:, : self.common(task)].sum(axis=1)
        whole = np.isfinite(self.values[task]).all(axis=1)
        return float(shares[whole].mean()) if whole.any() else float("nan")

    def even_common_share(self, task: str) -> float:
        """`common_share` of a gate that gives the same to all experts, as it does before training."""
        return self.common(task) / len(self.experts[task])


def is_gates_record(record: dict[str, Any]) -> bool:
    """Whether a record with `kind` and `step` has what belongs to gates: names of layers and experts, and as many values."""
    layers, tasks = record.get("layers"), record.get("tasks")
    if not _are_names(layers) or not isinstance(tasks, dict):
        return False
    for task in tasks.values():
        experts, rows = task.get("experts"), task.get("values")
        if not _are_names(experts) or not isinstance(rows, list) or len(rows) != len(layers):
            return False
        if not all(isinstance(row, list) and len(row) == len(experts) and all(map(_is_gate, row)) for row in rows):
            return False
    return True


def gates_of(record: dict[str, Any]) -> Gates:
    """The gates of a record for which `is_gates_record` holds."""
    tasks = record["tasks"]
    return Gates(
        record["step"],
        record["layers"],
        {name: task["experts"] for name, task in tasks.items()},
        {name: np.array(task["values"], dtype=np.float64) for name, task in tasks.items()},
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_gate(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= HIGHEST)
