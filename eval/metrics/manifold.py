"""Precision and recall: how many pictures look real, and how much of the real is made.

The manifold of a set is the union of balls around its features, each reaching to the point's k-th nearest neighbour in
the set. Precision is the share of generated features inside the reference's manifold, recall the share of reference
features inside the generated one's.

    φ_r = ‖f_r − NN_k(f_r)‖,   precision = mean_g [∃ r: ‖f_g − f_r‖ ≤ φ_r]      (Kynkäänniemi et al. 2019, eq. 1)

k = 3 as in torch-fidelity and the paper. Distances fall and manifolds grow with n, so scores compare only at equal n.
The reference is thinned to a fixed number, spread evenly, because the cost is n·m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics.base import Score, register
from eval.metrics.fid import Distance
from eval.statistics import Interval, bootstrap_mean, clustered_se, normal_interval

NEIGHBOURS = 3
MOST = 2_000
"""Reference features that enter."""
_BLOCK = 512
Array = NDArray[np.float64]


def squared_distances(a: Array, b: Array) -> Array:
    """(n, d), (m, d) -> (n, m)."""
    found = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.asarray(found.clip(min=0))


def radii(features: Array, k: int = NEIGHBOURS) -> Array:
    """Squared distance of each point to its k-th nearest neighbour in the set; itself does not count."""
    reach = np.empty(len(features))
    for start in range(0, len(features), _BLOCK):
        distances = squared_distances(features[start : start + _BLOCK], features)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = 0
        reach[start : start + _BLOCK] = np.partition(distances, k, axis=1)[:, k]
    return reach


def inside(points: Array, manifold: Array, reach: Array) -> NDArray[np.bool_]:
    """Which points lie in a ball around some point of the manifold."""
    return np.asarray((squared_distances(points, manifold) <= reach).any(axis=1))


class _Manifold(Distance):
    """What both share: features of the samples and of a thinned reference."""

    direction = "higher"
    unit = "%"
    smallest_n = 1_000

    def compute(self) -> Score:
        self._need(len(self._clusters), NEIGHBOURS + 2)
        return super().compute()

    def _more_protocol(self) -> dict[str, Any]:
        return {"k": NEIGHBOURS, "reference at most": MOST}


def _thinned(reference: Array) -> Array:
    if len(reference) <= MOST:
        return reference
    return reference[np.linspace(0, len(reference) - 1, MOST).round().astype(np.int64)]


@register
class Precision(_Manifold):
    """Share of generated pictures inside the manifold of the reference."""

    name = "precision"
    kind = "value"

    def _distance(self, features: Array, reference: Array) -> tuple[Interval, Array]:
        thinned = _thinned(reference)
        values = 100.0 * inside(features, thinned, radii(thinned)).astype(np.float64)
        return bootstrap_mean(values, self._clusters), values


@register
class Recall(_Manifold):
    """Share of the reference inside the manifold of the generated pictures."""

    name = "recall"

    def _distance(self, features: Array, reference: Array) -> tuple[Interval, Array]:
        """The influence of a sample is n times what recall loses without it, its neighbours' radii held fixed.

        A first-order account of the samples' share alone; the reference is held fixed as everywhere.
        """
        thinned = _thinned(reference)
        covers = squared_distances(thinned, features) <= radii(features)
        counts = covers.sum(axis=1)
        value = 100.0 * float(np.mean(counts > 0))
        alone = (covers & (counts == 1)[:, None]).sum(axis=0)
        influence = 100.0 * len(features) * alone / len(thinned)
        influence = influence - influence.mean()
        se = clustered_se(influence, self._clusters)
        return normal_interval(value, se, len(set(self._clusters))), influence
