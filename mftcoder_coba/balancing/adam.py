"""One step of Adam (arXiv 1412.6980, Algorithm 1) for a handful of numbers, in float64 and as plain arithmetic, so that equal
inputs give equal bits on every rank and the state can be saved as JSON."""

from __future__ import annotations

import numpy as np

BETA_MEAN, BETA_SQUARE, EPSILON = 0.9, 0.999, 1e-8
LARGEST_GRADIENT = 1e150  # its square is a float64
LARGEST_VALUE = 1e100  # so that sums and differences of values are, whatever rate and decay are


def adam_state(count: int) -> dict[str, np.ndarray]:
    """What Adam keeps for each of `count` numbers: steps taken, and running means of the gradient and of its square."""
    return {"updates": np.zeros(count, np.int64), "gradient_mean": np.zeros(count), "gradient_square": np.zeros(count)}


def adam_step(
    values: np.ndarray, gradient: np.ndarray, state: dict[str, np.ndarray], rate: float, decay: float = 0.0, epsilon: float = EPSILON
) -> np.ndarray:
    """The new values; `state` is updated in place.

    Args:
        values, gradient: [n]. A NaN gradient leaves its number and all that is kept of it as they are.
        state: holds what `adam_state` names.
        decay: added to the gradient as decay * values, as torch.optim.Adam does.
        epsilon: the size of gradient below which steps shrink.
    """
    there = ~np.isnan(gradient)
    with np.errstate(over="ignore"):
        full = np.clip(gradient + decay * values, -LARGEST_GRADIENT, LARGEST_GRADIENT)
    updates = state["updates"] + 1
    mean = BETA_MEAN * state["gradient_mean"] + (1 - BETA_MEAN) * full
    square = BETA_SQUARE * state["gradient_square"] + (1 - BETA_SQUARE) * full * full
    root = np.sqrt(square / (1 - BETA_SQUARE**updates))
    with np.errstate(over="ignore"):
        moved = np.clip(values - rate * (mean / (1 - BETA_MEAN**updates)) / (root + epsilon), -LARGEST_VALUE, LARGEST_VALUE)
    for name, new in (("updates", updates), ("gradient_mean", mean), ("gradient_square", square)):
        state[name] = np.where(there, new, state[name])
    return np.where(there, moved, values)
