"""Peak memory of a process that makes one picture, a new process for every sample; see eval.footprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.latency import median_interval
from eval.prompts import Prompt


@register
class Memory(PerSampleMetric):
    """Median of the peaks. measure: MiB of one sample; from the source unless it is given."""

    name = "memory"
    direction = "lower"
    unit = "MiB"
    smallest_n = 5
    media = "any"

    def __init__(self, source: Any = None, measure: Callable[[Prompt], float] | None = None) -> None:
        super().__init__()
        self._measure = measure or _of(source)

    def update(self, samples: Samples) -> None:
        self._add(np.array([self._measure(prompt) for prompt in samples.prompts]), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"statistic": "median", "of": "peak resident memory of a new process"}
        return self._score(median_interval(values), values, protocol).check()


def _of(source: Any) -> Callable[[Prompt], float]:
    from eval.footprint import measure
    from eval.sources import BundleSource

    if not isinstance(source, BundleSource):
        raise EvalError(f"memory is measured of bundles and this is {getattr(source, 'name', source)}; give a bundle")
    return lambda prompt: measure(source, prompt)
