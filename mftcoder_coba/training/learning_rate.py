"""The learning rate as a pure function of the step, so that there is no state to save."""

from __future__ import annotations

import math

from mftcoder_coba.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1 ... total_steps).

    Rises linearly over `warmup_steps`, then falls from `learning_rate` to `min_learning_rate` along half a cosine or a
    line, or stays.
    """
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * left
