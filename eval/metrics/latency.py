"""Milliseconds per picture, one at a time, on the machine that the run records."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import LEVEL, Interval

_WARM_UP = 2
"""The first pictures of a process pay for allocation; they are scored but do not enter the median."""


@register
class Latency(PerSampleMetric):
    """Median wall time of a picture with the distribution-free interval of order statistics."""

    name = "latency"
    direction = "lower"
    unit = "ms"
    smallest_n = 20
    media = "any"

    def update(self, samples: Samples) -> None:
        if samples.seconds is None:
            raise EvalError("latency needs pictures made one at a time; use a suite with batch: 1 and cache: false")
        self._add(samples.seconds * 1000, samples)

    def compute(self) -> Score:
        self._need(len(self._values), _WARM_UP + 1)
        values = np.array(self._values)
        protocol: dict[str, Any] = {"statistic": "median", "warm_up": _WARM_UP, "batch": 1}
        return self._score(median_interval(values[_WARM_UP:]), values, protocol).check()


def median_interval(values: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """The median between the order statistics n/2 ± z·√n/2, which no outlier can widen."""
    ordered, n = np.sort(values), len(values)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    low = max(0, int(np.floor(n / 2 - z * np.sqrt(n) / 2)) - 1)
    high = min(n - 1, int(np.ceil(n / 2 + z * np.sqrt(n) / 2)))
    return Interval(float(np.median(values)), float(ordered[low]), float(ordered[high]), float("nan"), n)
