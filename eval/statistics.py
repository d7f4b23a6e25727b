"""Intervals and differences, on numpy alone.

Samples come in clusters: several seeds of one prompt are not independent, so means are taken within a prompt first
and the prompts are what is resampled. Fréchet distances get the standard error of their influence function, because
their bootstrap is biased upwards. Everything that resamples is seeded and gives the same digits twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 2000
_EXACT_FLIPS = 12
"""Up to this many different differences all sign flips are listed."""
_EXACT_BINOMIAL = 100
"""Up to this many equal differences the binomial sum is exact; beyond, its normal limit is as good and much faster."""


@dataclass(frozen=True)
class Interval:
    """A value, its interval and its standard error, in the value's unit. n counts independent clusters."""

    value: float
    low: float
    high: float
    se: float
    n: int


@dataclass(frozen=True)
class Difference:
    """a − b on shared samples: its interval, the two-sided p-value of no difference and the number of pairs."""

    interval: Interval
    p: float
    pairs: int


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def normal_interval(value: float, se: float, n: int, level: float = LEVEL) -> Interval:
    """value ± z·se."""
    return Interval(value, value - _z(level) * se, value + _z(level) * se, se, n)


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion; stays inside [0, 1] and is right at 0 and n successes."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials is no proportion; give 0 <= successes <= n, n > 0")
    z, share = _z(level), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return Interval(share, low, high, math.sqrt(share * (1 - share) / n), n)


def cluster_means(values: Array, clusters: Sequence[Hashable]) -> Array:
    """The mean of each cluster, in order of first appearance."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values have {len(clusters)} clusters; give one cluster per value")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[cluster] for cluster in clusters], dtype=np.int64)
    return np.asarray(np.bincount(index, weights=values) / np.bincount(index))


def bootstrap_mean(
    values: Array, clusters: Sequence[Hashable] | None = None, *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean over clusters with a studentised (bootstrap-t) interval over them.

    values: (n,). clusters: one label per value, usually the prompt; None makes every value its own cluster.
    One cluster alone has no interval, nor has a mean that is not finite: low and high are NaN then.
    """
    means = np.asarray(values, dtype=np.float64) if clusters is None else cluster_means(values, clusters)
    n = len(means)
    if n == 0:
        raise ValueError("there are no values to average; give at least one")
    value = float(means.mean())
    if n == 1 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, math.nan, n)
    se = float(means.std(ddof=1)) / math.sqrt(n)
    if se == 0.0:
        return Interval(value, value, value, 0.0, n)
    t = _studentised(means, value, np.random.default_rng(seed))
    low, high = np.quantile(t, ((1 + level) / 2, (1 - level) / 2))
    return Interval(value, value - float(low) * se, value - float(high) * se, se, n)


def _studentised(means: Array, value: float, rng: np.random.Generator) -> Array:
    """t statistics of RESAMPLES bootstrap samples; those without spread are left out. Drawn in bounded blocks.

    Equal numbers have a spread of some 1e-17 after rounding, by which nothing may be divided.
    """
    n, least = len(means), 1e-9 * float(means.std(ddof=1)) / math.sqrt(len(means))
    block = max(1, 4_000_000 // n)
    parts = []
    for start in range(0, RESAMPLES, block):
        draw = means[rng.integers(n, size=(min(block, RESAMPLES - start), n))]
        spread = draw.std(axis=1, ddof=1) / math.sqrt(n)
        parts.append((draw.mean(axis=1)[spread > least] - value) / spread[spread > least])
    return np.concatenate(parts)


Tail = Literal["both", "below", "above"]


def sign_flip_p(differences: Array, tail: Tail = "both") -> float:
    """p-value of a zero mean when every difference could as well have had the other sign.

    differences: (n,), one per prompt. tail: both, or "below" (small when the mean lies below 0), or "above". Prompts
    without a difference say nothing and drop out. Exact for up to 12 differences, and for up to 100 that are equal in
    size (the binomial test, which for binary scores is McNemar's); else by the normal limit of the flipped sums, whose
    variance is Σd².
    """
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if tail == "both":
        side: Tail = "below" if moved.sum() < 0 else "above"
        return min(1.0, 2 * sign_flip_p(moved, side))
    if tail == "below":
        moved = -moved
    n, total = len(moved), float(moved.sum())
    if n == 0:
        return 1.0
    sizes = np.abs(moved)
    if n <= _EXACT_BINOMIAL and sizes.min() == sizes.max():
        return float(sum(math.comb(n, k) for k in range(int(np.sum(moved > 0)), n + 1)) / 2**n)
    if n <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(signs @ sizes >= total - 1e-12 * float(sizes.sum())))
    return NormalDist().cdf(-total / math.sqrt(float(np.square(moved).sum())))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): rejecting those below α makes one false alarm with at most α."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def rank_sum_p(a: Array, b: Array) -> float:
    """p-value of a not lying above b (Mann and Whitney's test), small where a's values are larger; normal limit.

    Ties share their ranks and shrink the variance.
    """
    n, m = len(a), len(b)
    if n == 0 or m == 0:
        raise ValueError(f"{n} and {m} values cannot be ranked against each other; give at least one of each")
    _, index, counts = np.unique(np.concatenate([a, b]), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    u = float(ranks[index[:n]].sum()) - n * (n + 1) / 2
    total = n + m
    ties = float(np.sum(counts.astype(np.float64) ** 3 - counts)) / (total * (total - 1)) if total > 1 else 0.0
    variance = n * m / 12 * (total + 1 - ties)
    if variance <= 0:
        return 1.0
    return NormalDist().cdf(-(u - n * m / 2 - 0.5) / math.sqrt(variance))


def paired_difference(
    a: Mapping[tuple[Any, int], float], b: Mapping[tuple[Any, int], float], *, level: float = LEVEL, seed: int = 0
) -> Difference:
    """Mean of a − b over samples that both have, keyed by (prompt, seed) and clustered by prompt."""
    keys = sorted(set(a) & set(b), key=str)
    if not keys:
        raise ValueError("the two runs share no (prompt, seed) pair; score both on the same suite")
    values = np.array([a[key] - b[key] for key in keys])
    prompts = [key[0] for key in keys]
    interval = bootstrap_mean(values, prompts, level=level, seed=seed)
    return Difference(interval, sign_flip_p(cluster_means(values, prompts)), len(keys))


def influence_difference(
    value_a: float,
    value_b: float,
    a: Mapping[tuple[Any, int], float],
    b: Mapping[tuple[Any, int], float],
    *,
    level: float = LEVEL,
) -> Difference:
    """a − b of a statistic that is no mean (FID, KID), from per-sample influences on it.

    To first order the statistic moves with the mean of the influences, so the standard error of the difference is that
    of the mean of their paired differences, clustered by prompt. Both must rest on the same samples.
    """
    if set(a) != set(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} samples are not the same pairs; score both on the same suite")
    keys = sorted(a, key=str)
    prompts = [key[0] for key in keys]
    se = clustered_se(np.array([a[key] - b[key] for key in keys]), prompts)
    interval = normal_interval(value_a - value_b, se, len(set(prompts)), level)
    p = 2 * NormalDist().cdf(-abs(interval.value) / se) if se > 0 else float(interval.value == 0)
    return Difference(interval, p, len(keys))


def clustered_se(influence: Array, clusters: Sequence[Hashable]) -> float:
    """Standard error of a statistic from per-sample influences: √(c/(c−1)·Σ_c (Σ_i∈c IF_i)²)/n, NaN for one cluster."""
    totals: dict[Hashable, float] = {}
    for cluster, value in zip(clusters, influence - influence.mean(), strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + float(value)
    count = len(totals)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * sum(t * t for t in totals.values())) / len(influence)


def root(matrix: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix; small negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def frechet_influence(features: Array, mean: Array, covariance: Array) -> Array:
    """Influence of every generated sample on the Fréchet distance to a fixed Gaussian reference.

    IF(x) = 2·(μ − μ_r)·(x − μ) + (x − μ)ᵀ(I − T)(x − μ), centred, with T = S(S Σ S)^(−1/2)S and S = Σ_r^(1/2) the
    Gaussian transport map from the samples to the reference; this is the derivative of the distance when a little of
    the samples' weight moves to x. sd(IF)/√n is the standard error of the distance.

    features: (n, d), mean: (d,), covariance: (d, d) of the reference. Returns (n,), which sums to 0. With n <= d only
    the directions that the samples span count, which makes the error approximate.
    """
    centre = features.mean(axis=0)
    offset = features - centre
    sigma = offset.T @ offset / (len(features) - 1)
    s = root(covariance)
    values, vectors = np.linalg.eigh(s @ sigma @ s)
    keep = values > values.max() * 1e-10
    inverse = (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T
    transport = s @ inverse @ s
    quadratic = np.einsum("nd,nd->n", offset, offset - offset @ transport)
    influence = 2 * offset @ (centre - mean) + quadratic
    return np.asarray(influence - influence.mean())


@dataclass(frozen=True)
class KernelTerms:
    """What the error of a squared kernel distance needs: influences (n,) and the second-order variance ζ₂."""

    influence: Array
    second_order: float

    def se(self, clusters: Sequence[Hashable]) -> float:
        """Standard error of the full U-statistic against a fixed reference."""
        first = clustered_se(self.influence, clusters)
        return math.sqrt(first**2 + 2 * self.second_order / len(self.influence) ** 2)


def _cubic_kernel(a: Array, b: Array) -> Array:
    base = a @ b.T / a.shape[1] + 1
    return np.asarray(base * base * base)  # ten times faster than ** 3


def gaussian_kernel(bandwidth: float) -> Callable[[Array, Array], Array]:
    """exp(−‖x − y‖²/(2·bandwidth²)) of rows."""

    def kernel(a: Array, b: Array) -> Array:
        squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
        return np.asarray(np.exp(-squared.clip(min=0) / (2 * bandwidth**2)))

    return kernel


def squared_discrepancy(
    features: Array, reference: Array, kernel: Callable[[Array, Array], Array], block: int = 512
) -> float:
    """MMD² without bias: means over pairs of different rows within each set, minus twice the mean across."""

    def total(a: Array, b: Array) -> float:
        return sum(float(kernel(a[start : start + block], b).sum()) for start in range(0, len(a), block))

    def within(a: Array) -> float:
        own = sum(float(np.diagonal(kernel(a[i : i + 1], a[i : i + 1])).sum()) for i in range(len(a)))
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(features) + within(reference) - 2 * total(features, reference) / (len(features) * len(reference))


def kernel_terms(
    features: Array,
    reference: Array,
    kernel: Callable[[Array, Array], Array] = _cubic_kernel,
    block: int = 512,
) -> KernelTerms:
    """Influences on MMD² with a kernel, KID's (x·y/d + 1)³ unless another is given, in blocks of rows.

    IF(x) = 2·(mean_x' k(x, x') − mean_y k(x, y)), centred; ζ₂ is the variance of the doubly centred kernel, all that is
    left when both sets have one distribution.
    """
    n = len(features)
    rows = np.empty(n)
    squares = 0.0
    cross = np.empty(n)
    for start in range(0, n, block):
        part = features[start : start + block]
        own = kernel(part, features)
        rows[start : start + block] = own.mean(axis=1)
        squares += float(np.square(own).sum())
        cross[start : start + block] = kernel(part, reference).mean(axis=1)
    influence = 2 * (rows - cross)
    second = squares / n**2 - 2 * float(np.square(rows).mean()) + float(rows.mean()) ** 2
    return KernelTerms(influence - influence.mean(), max(second, 0.0))
