"""CMMD: how far two sets of CLIP embeddings are apart, without taking either for a Gaussian.

    CMMD = 1000 · MMD²(x/‖x‖, y/‖y‖),   k(a, b) = exp(−‖a − b‖²/(2σ²)),   σ = 10

of Jayasumana et al. (arXiv 2401.09603). The published code adds up all pairs, a picture with itself too, which favours
small sets; here pairs of one picture are left out, so that the mean does not depend on n. The distance may therefore be
a little below 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics.base import register
from eval.metrics.extractors import Extractor
from eval.metrics.fid import Distance
from eval.metrics.references import Truth
from eval.statistics import Interval, gaussian_kernel, kernel_terms, normal_interval, squared_discrepancy

BANDWIDTH, SCALE = 10.0, 1000.0


@register
class Cmmd(Distance):
    """Squared kernel distance of normalised embeddings, Gaussian kernel."""

    name = "cmmd"
    direction = "lower"
    unit = ""
    smallest_n = 1_000

    def __init__(
        self,
        folder: Path | None = None,
        extractor: str | Extractor = "clip-vit-l-14-336",
        reference_folder: str | None = None,
        reference: Truth | None = None,
    ) -> None:
        super().__init__(folder, extractor, reference_folder=reference_folder, reference=reference)

    def _more_protocol(self) -> dict[str, Any]:
        return {"bandwidth": BANDWIDTH}

    def _distance(
        self, features: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[Interval, NDArray[np.float64]]:
        ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, reference))
        kernel = gaussian_kernel(BANDWIDTH)
        terms = kernel_terms(ours, theirs, kernel)
        value = SCALE * squared_discrepancy(ours, theirs, kernel)
        interval = normal_interval(value, SCALE * terms.se(self._clusters), len(set(self._clusters)))
        return interval, SCALE * terms.influence
