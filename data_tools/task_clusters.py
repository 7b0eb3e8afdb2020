"""Which tasks belong together, from inner products of the gradients of their losses: pure numbers, no model.

A task's gradient over a few samples is g_i = m_i + e_i: the gradient over all its data, and noise that shrinks every cosine:

    cos(g_i, g_j)  is about  cos(m_i, m_j) sqrt(r_i r_j),      r_i = |m_i|^2 / (|m_i|^2 + E|e_i|^2), the reliability of g_i

Two halves of the samples have noise of their own, so the cosine of their gradients, `self` = s_i, is about |m_i|^2 / (|m_i|^2 + 2 E|e_i|^2): the
noise of half the samples is twice as large. Hence r_i = 2 s_i / (1 + s_i) (Spearman and Brown's formula), and

    affinity_ij = cos(g_i, g_j) / sqrt(r_i r_j), within [-1, 1]

is what the cosine of endless samples would be. Dividing by sqrt(s_i s_j) itself would correct too much, as the numerator is of all samples. s_i is an
estimate too: below `LEAST_SELF` it tells little of r_i, and dividing by it would make noise large. It is raised to `LEAST_SELF` there, so that the
affinities of such a task stay too small rather than become wild, and the task is named as one that cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LEAST_SELF = 0.2  # corrects a cosine by no more than the factor 3
LEAST_SILHOUETTE = 0.25  # below, the usual reading of a mean silhouette is: no structure
LEAST_GAP = 0.1  # of mean affinity, within clusters above between them: silhouettes have no scale, and divide also what is nearly the same
LEAST_OF_TWO = 0.5  # affinity from which two tasks go together; silhouettes need three


@dataclass(frozen=True)
class Clusters:
    """A division of K tasks.

    Attributes:
        labels: [K] number of each task's cluster; clusters are numbered from 0 in the order of their first tasks.
        reason: why so many, as a sentence.
        silhouettes: number of clusters -> mean silhouette, of all numbers that were tried.
    """

    labels: tuple[int, ...]
    reason: str
    silhouettes: dict[int, float]

    def named(self, names: Sequence[str]) -> dict[str, list[str]]:
        """As `adapter.clusters` of a config has them."""
        return {
            f"cluster{label + 1}": [name for name, own in zip(names, self.labels, strict=True) if own == label] for label in sorted(set(self.labels))
        }


def cosines(products: NDArray[np.float64]) -> tuple[Matrix, NDArray[np.float64]]:
    """(cosines of the tasks' gradients [K, K], cosine of the two halves of each task, `self` [K]).

    Args:
        products: [K, 2, K, 2] inner products of the halves' gradients; a task's gradient is the sum of its halves. Each length is above 0.
    """
    tasks = range(len(products))
    whole = products.sum((1, 3))
    halves = products[tasks, :, tasks, :]  # [K, 2, 2]
    return _cosine(whole), np.array([_cosine(pair)[0, 1] for pair in halves])


def _cosine(products: Matrix) -> Matrix:
    lengths = np.sqrt(np.diag(products))
    cosine = np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def without_noise(cosine: Matrix, own: NDArray[np.float64]) -> Matrix:
    """Affinities [K, K] from cosines [K, K] and `self` [K]; see above."""
    least = np.maximum(own, LEAST_SELF)
    reliability = 2.0 * least / (1.0 + least)
    affinity = np.clip(cosine / np.sqrt(np.outer(reliability, reliability)), -1.0, 1.0)
    np.fill_diagonal(affinity, 1.0)
    return affinity


def divide(affinity: Matrix, number: int) -> tuple[int, ...]:
    """Labels of `number` clusters, 1 to K, by average linkage on 1 - affinity: the closest two clusters join until so many are left."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    tasks = len(affinity)
    clusters = [[task] for task in range(tasks)]
    if number < tasks:
        merges = linkage(squareform(1.0 - affinity, checks=False), "average")
        for one, other in merges[: tasks - number, :2].astype(int):  # each makes the next cluster
            clusters.append(clusters[one] + clusters[other])
            clusters[one] = clusters[other] = []
    labels = np.empty(tasks, int)
    for label, members in enumerate(sorted(sorted(cluster) for cluster in clusters if cluster)):
        labels[members] = label
    return tuple(labels.tolist())


def silhouette(affinity: Matrix, labels: Sequence[int]) -> float:
    """Mean over tasks of (b - a) / max(a, b): a is the mean distance 1 - affinity to the tasks of its cluster, b that to those of the nearest other.

    A task alone in its cluster counts 0, as is usual. There are two clusters or more.
    """
    distances, member = 1.0 - affinity, np.eye(max(labels) + 1)[list(labels)]  # [K, K], [K, clusters]
    sizes, sums, own = member.sum(0), distances @ member, member > 0
    alone = (member @ sizes) == 1
    a = sums[own] / np.maximum(member @ sizes - 1, 1)
    b = np.where(own, np.inf, sums / sizes).min(1)
    scale = np.maximum(a, b)
    values = np.divide(b - a, scale, out=np.zeros(len(labels)), where=(scale > 0) & ~alone)
    return float(values.mean())


def separation(affinity: Matrix, labels: Sequence[int]) -> tuple[float, float]:
    """Mean affinity of two tasks (of one cluster, of two); NaN where there is no such pair."""
    same = np.equal.outer(labels, labels)
    pairs = ~np.eye(len(labels), dtype=bool)
    within, between = affinity[same & pairs], affinity[~same]
    return float(within.mean()) if within.size else float("nan"), float(between.mean()) if between.size else float("nan")


def propose(affinity: Matrix, number: int | None = None) -> Clusters:
    """Divides the tasks into `number` clusters, or into as many as separate best.

    Without a number: of 2 to K - 1 clusters, those with the largest mean silhouette, and more of them where it is equal, as it is whether two tasks
    that are as far from each other as from all others are joined or not. But one cluster if the largest is below `LEAST_SILHOUETTE`, or if
    the mean affinity within the clusters is not `LEAST_GAP` above that between them. Two tasks go together from an affinity of `LEAST_OF_TWO` on.

    Args:
        affinity: [K, K], symmetric, 1 on the diagonal.
        number: 1 to K.
    """
    tasks = len(affinity)
    divisions = {count: divide(affinity, count) for count in range(2, tasks)}
    silhouettes = {count: silhouette(affinity, labels) for count, labels in divisions.items()}
    if number is not None:
        return Clusters(divide(affinity, number), "as many as asked for", silhouettes)
    if tasks == 1:
        return Clusters((0,), "there is one task", {})
    if tasks == 2:
        together = bool(affinity[0, 1] >= LEAST_OF_TWO)
        reason = f"two tasks go together from an affinity of {LEAST_OF_TWO} on, and theirs is {affinity[0, 1]:.2f}"
        return Clusters((0, 0) if together else (0, 1), reason, {})
    best = max(silhouettes, key=lambda count: (round(silhouettes[count], 9), count))
    found = f"the largest mean silhouette of 2 to {tasks - 1} clusters is {silhouettes[best]:.2f}, of {best}"
    within, between = separation(affinity, divisions[best])
    if silhouettes[best] < LEAST_SILHOUETTE:
        return Clusters((0,) * tasks, f"nothing separates the tasks: {found}, below {LEAST_SILHOUETTE}", silhouettes)
    means = f"mean affinity {within:.2f} within them, {between:.2f} between"
    if within - between < LEAST_GAP:
        return Clusters((0,) * tasks, f"nothing separates the tasks: {found}, but with a {means}, less than {LEAST_GAP} apart", silhouettes)
    return Clusters(divisions[best], f"{found}; {means}", silhouettes)
