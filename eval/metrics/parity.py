"""How far a runtime's pictures or clips are from those of ONNX Runtime in float32, of one bundle, prompts and seeds.

    d = mean|a − b| over the pixels of a picture, or of all frames of a clip, in levels of 255

0 for the reference itself. Export checks graphs once, against torch; this checks whole pictures, every night, on the
machine, runtime, version and precision that serve.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean


@register
class Parity(PerSampleMetric):
    """Mean difference per picture. reference: another source of pictures; of the source's own bundle unless given."""

    name = "parity"
    direction = "lower"
    unit = "levels"
    smallest_n = 20
    media = "any"

    def __init__(self, source: Any = None, reference: Any = None) -> None:
        super().__init__()
        self._reference = reference or _reference_of(source)

    def update(self, samples: Samples) -> None:
        wanted = self._reference.make(samples.prompts)
        if wanted.shape != samples.images.shape:
            shapes = f"{wanted.shape} and this {samples.images.shape}"
            raise EvalError(f"the reference makes pictures {shapes}; export the bundle again")
        apart = np.abs(samples.images.astype(np.float64) - wanted)
        self._add(apart.reshape(len(apart), -1).mean(axis=1), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"reference": "onnx float32"}
        return self._score(bootstrap_mean(values, self._clusters), values, protocol).check()


def _reference_of(source: Any) -> Any:
    from eval.sources import BundleSource

    if not isinstance(source, BundleSource):
        raise EvalError(f"parity is measured of bundles and this is {getattr(source, 'name', source)}; give a bundle")
    return source.computed_by("onnx", "float32")
