"""Which step is the best so far, and when to stop."""

from __future__ import annotations

import math
from typing import Any

from mftcoder_coba.config import EarlyStoppingConfig


class BestStep:
    """Follows the criterion over the validations of a run."""

    def __init__(self, config: EarlyStoppingConfig):
        self.config = config
        self.step: int | None = None
        self.value = math.inf
        self.validations_since = 0

    def criterion(self, ratios: dict[str, float]) -> float:
        """The number that is to become small; NaN where a task's ratio is not finite, whichever task the criterion names: a model that one
        task has broken is no good one.

        Args:
            ratios: per task with validation data, its loss over that before training.
        """
        if not all(map(math.isfinite, ratios.values())):
            return math.nan
        match self.config.criterion.partition(":"):
            case ("mean_ratio", _, _):
                return sum(ratios.values()) / len(ratios)
            case ("worst_ratio", _, _):
                return max(ratios.values())
            case (_, _, task):
                return ratios[task]

    def update(self, step: int, ratios: dict[str, float]) -> bool:
        """Takes in the validation after `step`; True if it is the best so far. A value that is not finite never is."""
        value = self.criterion(ratios)
        if math.isfinite(value) and value < self.value:
            self.step, self.value, self.validations_since = step, value, 0
            return True
        self.validations_since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """True when `patience` validations in a row brought no new best."""
        return self.config.patience is not None and self.validations_since >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": None if math.isinf(self.value) else self.value, "validations_since": self.validations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.validations_since = state["step"], state["validations_since"]
        self.value = math.inf if state["value"] is None else state["value"]
