"""Pictures per second when many are made at once, on the machine that the run records."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.latency import median_interval

_WARM_UP = 2
"""The first batches of a process pay for allocation; they are scored but do not enter the median."""


@register
class Throughput(PerSampleMetric):
    """Median over batches of pictures/second; every picture carries the rate of its batch. The last may be smaller."""

    name = "throughput"
    direction = "higher"
    unit = "/s"
    smallest_n = 80
    media = "any"

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []

    def update(self, samples: Samples) -> None:
        if samples.batch_seconds is None:
            raise EvalError("throughput needs pictures made now; use a suite with cache: false")
        count = len(samples.prompts)
        self._sizes.append(count)
        self._add(np.full(count, count / samples.batch_seconds), samples)

    def compute(self) -> Score:
        if len(set(self._sizes[:-1])) > 1 or self._sizes[-1:] > self._sizes[:1]:
            raise EvalError(
                f"throughput got batches of {sorted(set(self._sizes))} pictures; "
                "use a number of samples that the suite's batch divides"
            )
        self._need(len(self._sizes), _WARM_UP + 1)
        values, size = np.array(self._values), self._sizes[0]
        protocol: dict[str, Any] = {"statistic": "median", "warm_up": _WARM_UP * size, "batch": size}
        return self._score(median_interval(values[_WARM_UP * size :: size]), values, protocol).check()
