"""Do samples that come early in the first epoch end with a higher loss? Pure: losses and positions in, curves and correlations out.

The observation is that of arXiv 2410.03743. A model's loss on a sample says more of how hard the sample is than of when it was seen.
Other orders have the sample at other places, so the mean of their models' losses is a measure of its difficulty that has nothing to do
with its place in this order: the *excess* is what a model's loss is above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from mftcoder_coba.data import Epoch, Row

BINS = 20


@dataclass(frozen=True)
class Imbalance:
    """One model, or one for each order.

    Attributes:
        loss, excess: [bins] mean over samples whose position is in the bin, then over orders; NaN where there are none.
        loss_correlation, excess_correlation: [orders] Spearman's, of position and value; NaN where one of them does not vary.
    """

    loss: NDArray[np.float64]
    excess: NDArray[np.float64]
    loss_correlation: NDArray[np.float64]
    excess_correlation: NDArray[np.float64]


def positions_of(epoch: Epoch, samples: Row) -> NDArray[np.float64]:
    """Where in the epoch each of the samples comes first, in [0, 1): its row over all rows. NaN for one that does not come. [samples]"""
    row = np.repeat(np.arange(len(epoch)), np.diff(epoch.starts))
    first: dict[tuple[int, int], int] = {}
    for sample, place in zip(zip(epoch.tasks.tolist(), epoch.samples.tolist(), strict=True), row.tolist(), strict=True):
        first.setdefault(sample, place)
    return np.array([first.get(sample, np.nan) for sample in samples], np.float64) / len(epoch)


def excess_of(own: NDArray[np.float64], singles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loss minus the mean over the single models of the *other* orders. NaN where there is no other.

    Args:
        own: [orders, samples] the losses that are looked at in the place of each order's model.
        singles: [orders, samples] of the single models.
    """
    orders = len(singles)
    if orders < 2:
        return np.full_like(own, np.nan)
    return own - np.array([np.delete(singles, order, axis=0).mean(axis=0) for order in range(orders)])


def binned_mean(positions: NDArray[np.float64], values: NDArray[np.float64], bins: int = BINS) -> NDArray[np.float64]:
    """Mean of the values in each of `bins` equal parts of [0, 1); NaN where there are none. What is NaN is left out."""
    seen = np.isfinite(positions) & np.isfinite(values)
    place = (positions[seen] * bins).astype(np.int64)
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, values[seen], minlength=bins)
    return np.divide(sums, counts, out=np.full(bins, np.nan), where=counts > 0)


def rank_correlation(positions: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Spearman's. NaN where fewer than three are there, or one of both does not vary."""
    seen = np.isfinite(positions) & np.isfinite(values)
    if seen.sum() < 3 or np.ptp(positions[seen]) == 0 or np.ptp(values[seen]) == 0:
        return float("nan")
    return float(spearmanr(positions[seen], values[seen]).statistic)


def imbalance_of(own: NDArray[np.float64], singles: NDArray[np.float64], positions: NDArray[np.float64], bins: int = BINS) -> Imbalance:
    """Of the single models (`own` is `singles`), or of one model that is looked at in every order.

    Args:
        own: [orders, samples], or [samples] of the one model.
        singles: [orders, samples] of the single models.
        positions: [orders, samples] of the samples in each order, see `positions_of`.
    """
    own = np.broadcast_to(own, singles.shape)
    excess = excess_of(own, singles)
    pairs = [(positions, own), (positions, excess)]
    curves = [_mean_of_orders(np.array([binned_mean(*of, bins) for of in zip(*pair, strict=True)])) for pair in pairs]
    correlations = [np.array([rank_correlation(*of) for of in zip(*pair, strict=True)]) for pair in pairs]
    return Imbalance(*curves, *correlations)


def _mean_of_orders(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """[orders, bins] -> [bins], without what is NaN."""
    counts = np.isfinite(curves).sum(axis=0)
    return np.divide(np.nansum(curves, axis=0), counts, out=np.full(curves.shape[1], np.nan), where=counts > 0)
