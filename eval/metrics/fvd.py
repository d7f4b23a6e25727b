"""Fréchet and kernel distances of clips in a registered video feature space, in the place of I3D's (FVD, KVD).

FVD (Unterthiner et al., arXiv 1812.01717) is FID of whole clips; its features are of an I3D that was trained on
Kinetics. Here they are what the labeller of motion has pooled over all places and times (extractor scenes-motion): it
knows what moves how and of which thing, and no model is trained on its answers. The tower of models/scenes-video-reward
would do as well, but AMD trains on that reward, and a distance in its space would praise whoever pleases it. Maxima and
means differ in scale, so each feature is first centred and divided by its deviation over the reference: a fixed map.
Values compare with no published FVD.

Intervals are those of FID and KID: influence functions, the reference held fixed. The published number of clips is
2,048; below 256 nothing should be reported. As FID, FVD falls with the number of clips, so compare at equal n only, and
with the row of true clips, which is what a perfect model gets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import Samples, register
from eval.metrics.extractors import Extractor
from eval.metrics.fid import Distance, Fid, Kid
from eval.metrics.references import ClipReference, Truth
from eval.prompts import EVALUATION_SEEDS
from eval.statistics import Interval


class ClipDistance(Distance):
    """What FVD and KVD share: true clips as the reference, of as many frames as the samples have."""

    media = "clips"

    def __init__(
        self,
        folder: Path | None = None,
        extractor: str | Extractor = "scenes-motion",
        reference_seed: int = EVALUATION_SEEDS.stop - 1,
        reference_count: int = 1000,
        frames: int = 17,
        reference: Truth | None = None,
    ) -> None:
        truth = reference or ClipReference(reference_seed, reference_count, frames)
        super().__init__(folder, extractor, reference=truth)
        self._frames = frames

    def update(self, samples: Samples) -> None:
        if samples.frames != self._frames:
            raise EvalError(f"{self.name} compares clips of {self._frames} frames and got {samples.frames}; set frames")
        super().update(samples)

    def _distance(
        self, features: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[Interval, NDArray[np.float64]]:
        mean, deviation = reference.mean(axis=0), reference.std(axis=0)
        scale = np.where(deviation == 0, 1, deviation)
        return super()._distance((features - mean) / scale, (reference - mean) / scale)


@register
class Fvd(ClipDistance, Fid):
    """Fréchet distance of Gaussians fitted to the features of clips."""

    name = "fvd"
    smallest_n = 256


@register
class Kvd(ClipDistance, Kid):
    """Squared kernel distance of the features of clips, polynomial of degree 3; without FID's bias."""

    name = "kvd"
    smallest_n = 256
