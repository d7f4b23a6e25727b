"""Subject consistency: do things stay themselves through a clip? VBench's formula over features of our own.

    s = 1/(F−1) Σ_{t=2..F} ½·(max(0, cos(f_t, f_{t−1})) + max(0, cos(f_t, f_1)))

VBench (arXiv 2311.17982) takes f from DINO ViT-B/16, which is not here; the image tower of models/scenes-clip, trained
on this world, stands in for it, so values compare with no published ones. A frozen clip scores 1: read it beside motion
accuracy, and against the row of true clips.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.extractors import Extractor, load_extractor
from eval.statistics import bootstrap_mean


@register
class SubjectConsistency(PerSampleMetric):
    """Mean over clips."""

    name = "subject-consistency"
    direction = "higher"
    unit = ""
    smallest_n = 100
    media = "clips"

    def __init__(self, folder: Path | None = None, extractor: str | Extractor = "scenes-clip") -> None:
        super().__init__()
        self._extractor = load_extractor(folder, extractor) if isinstance(extractor, str) else extractor

    def update(self, samples: Samples) -> None:
        count, frames = samples.images.shape[:2]
        features = self._extractor(samples.images.reshape(count * frames, *samples.images.shape[2:]))
        self._add(consistency(features.reshape(count, frames, -1).astype(np.float64)), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"extractor": self._extractor.name, "weights": self._extractor.digest}
        return self._score(bootstrap_mean(values, self._clusters), values, protocol).check()


def consistency(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, F, D) features of frames to (B,)."""
    sizes = np.linalg.norm(features, axis=2, keepdims=True)
    unit = features / np.where(sizes == 0, 1, sizes)
    to_previous = np.einsum("bfd,bfd->bf", unit[:, 1:], unit[:, :-1])
    to_first = np.einsum("bfd,bd->bf", unit[:, 1:], unit[:, 0])
    return np.asarray((to_previous.clip(min=0) + to_first.clip(min=0)).mean(axis=1) / 2)
