"""CoBa as the official repository computes it (github.com/codefuse-ai/MFTCoder, class CoBaStatus), to match old runs.

The parts are those of `coba`; these differ, with t the number of the observation, u the update interval, and y_k its ratios:

    history  the ratios of observations 2..t: the first is left out
    slope    over the last  u t - max(0, t - N)  ratios of the history. For u = 1 these are the last N; for u > 1 all
    x values 0, 1, 2, ... over the ratios that are there: what is missing leaves no gap
    ACS      over the slopes of observations  W + max(0, t - N) .. t,  and n is their number: at most N - W + 1
    DF       m softmax_j(-tau m b(j) / sum_j |b(j)|) at j = t,  j = W..t, not limited to 1;
             b(j) is the slope of the largest ratio, max_k y_k, in place of the largest slope
    weight   softmax over tasks of  K (DF RCS + (1 - DF) ACS); where one of them is below the floor f = 1 / (10 K),
             all become  (1 - K f) w + f

The repository measures from after its second step on and counts steps where this program counts observations; for u > 1 its
measurements are one step later than here, as many, and the weights of a step rest on equally many. It divides by zero where
all slopes of a sum are 0 and stops where N < W; here zero denominators are those of `coba`, and `resolve` refuses N < W.
"""

from __future__ import annotations

import numpy as np

from mftcoder_coba.balancing.base import softmax
from mftcoder_coba.balancing.coba_formulas import ols_slopes, share_of_last


def fitted_part(t: int, window: int, interval: int) -> slice:
    """Which of the ratios of observations 1..t the fit is over."""
    count = interval * t - max(0, t - window)
    return slice(max(1, t - count), t)


def scored_part(t: int, window: int, warmup: int) -> slice:
    """Which of the slopes of observations 1..t ACS is over. Before t = W, where no weight rests on it: the last one."""
    return slice(min(warmup - 1 + max(0, t - window), t - 1), t)


def gapless_slopes(ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """[n, K] ratios, NaN where missing -> the slopes [K], and the slope of the largest ratio of each row; 0 for fewer than
    two ratios."""
    largest = np.fmax.reduce(ratios, axis=1)  # NaN only where all are
    slopes = [_gapless_slope(column) for column in (*ratios.T, largest)]
    return np.array(slopes[:-1]), slopes[-1]


def unclipped_factor(worst: np.ndarray, tau: float) -> float:
    """DF: [m] slopes of the largest ratio from t = W on -> a number of 0 or more."""
    return len(worst) * share_of_last(worst, tau)


def balanced_and_floored(blend: np.ndarray) -> np.ndarray:
    """[K] DF RCS + (1 - DF) ACS -> the weights [K]."""
    weights, floor = softmax(len(blend) * blend), 0.1 / len(blend)
    return weights * (1.0 - floor * len(blend)) + floor if weights.min() < floor else weights


def _gapless_slope(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(ols_slopes(np.arange(len(there)), there[:, None])[0]) if len(there) > 1 else 0.0
