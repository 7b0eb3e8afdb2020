"""CoBa's formulas (`coba` has them as mathematics), as functions of arrays: slopes, scores and the divergence factor."""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import LARGEST_LOSS, softmax


def ols_slopes(steps: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Least-squares slope of each task's line: [n] steps, [n, K] ratios (NaN: missing) -> [K]; 0 where there are fewer than
    two ratios."""
    seen = ~np.isnan(ratios)
    if seen.all():
        seen = seen[:, :1]  # the steps are then the same for every task: one column of them does for all
    x = (steps - steps[-1])[:, None] * seen  # from the newest step, so that the numbers are small
    x = (x - x.sum(axis=0) / np.maximum(np.count_nonzero(seen, axis=0), 1)) * seen
    # Any number may be taken off a task's ratios. With one of them constant ratios become 0, and so does their slope,
    # exactly: ACS would blow a rounding error up to a full score.
    y = ratios - np.fmin.reduce(ratios, axis=0)
    np.copyto(y, 0.0, where=~seen)
    y *= x  # in place: at this size new memory costs more than the arithmetic
    return quotient(y.sum(axis=0), (x * x).sum(axis=0))


def paired_slopes(steps: np.ndarray, ratios: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Least-squares slope of each task with one intercept per slot, so that only ratios of equal samples are compared.

    With x and y less their means over the slot: a = sum x y / sum x^2. (This program's own; the paper has the plain fit only.)

    Args:
        steps: [n]. ratios: [n, K], NaN where missing. slots: [n, K], 0 or more; a task's own numbering. Memory grows with
            the largest.

    Returns:
        [K]; 0 where no slot of the task has two ratios.
    """
    seen = ~np.isnan(ratios)
    tasks, slot_count = ratios.shape[1], int(slots.max()) + 1
    # One number per task and slot says which intercept a ratio has; what is missing goes to a line of its own.
    lines = np.where(seen, slots + slot_count * np.arange(tasks), slot_count * tasks).ravel()
    size = slot_count * tasks + 1
    x = np.repeat((steps - steps[-1]).astype(np.float64), tasks)
    x -= (np.bincount(lines, x, size) / np.maximum(np.bincount(lines, minlength=size), 1))[lines]
    y = np.where(seen, ratios, 0.0).ravel()
    lowest = np.full(size, np.inf)
    np.minimum.at(lowest, lines, y)
    y -= lowest[lines]  # for the reason given in ols_slopes
    x, y = x.reshape(seen.shape), y.reshape(seen.shape)
    x *= seen
    y *= x
    x *= x
    return quotient(y.sum(axis=0), x.sum(axis=0))


def relative_scores(slopes: np.ndarray) -> np.ndarray:
    """RCS: [K] slopes at t -> [K] with the sum 1."""
    return softmax(len(slopes) * quotient(slopes, np.abs(slopes).sum()))


def absolute_scores(slopes: np.ndarray) -> np.ndarray:
    """ACS: [n, K] the last n slopes, those of t at the end -> [K] with the sum 1."""
    return softmax(-len(slopes) * quotient(slopes[-1], np.abs(slopes).sum(axis=0)))


def divergence_factor(worst: np.ndarray, tau: float) -> float:
    """DF: [m] a_max of the observations that count, that of t at the end -> a number from 0 to 1."""
    count = len(worst)
    return min(count * share_of_last(worst, tau), 1.0)


def share_of_last(worst: np.ndarray, tau: float) -> float:
    """The softmax in DF at j = t: [m] -> a number from 0 to 1."""
    strength = min(tau * len(worst), LARGEST_LOSS)  # whatever tau is
    return float(softmax(-strength * quotient(worst, np.abs(worst).sum()))[-1])


def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)
