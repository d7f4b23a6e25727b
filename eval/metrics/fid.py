"""FID and KID by torch-fidelity's own code, over any registered feature extractor.

The value is torch-fidelity's; the interval is ours, from the influence of every picture on it, with the reference held
fixed. Both distances fall with the number of samples (FID's bias), so scores compare only at equal n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import Metric, PerSample, Samples, Score, register
from eval.metrics.extractors import Extractor, load_extractor
from eval.metrics.references import DigitsReference, FolderReference, Reference, Truth
from eval.prompts import EVALUATION_SEEDS
from eval.statistics import Interval, clustered_se, frechet_influence, kernel_terms, normal_interval

_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020


class Distance(Metric):
    """What FID, KID, precision and recall share: features of the samples, features of the reference."""

    kind: ClassVar[PerSample] = "influence"

    def __init__(
        self,
        folder: Path | None = None,
        extractor: str | Extractor = "scenes-clip",
        reference_seed: int = EVALUATION_SEEDS.stop - 1,
        reference_count: int = 20_000,
        reference_world: Literal["scenes", "digits"] = "scenes",
        reference_folder: str | None = None,
        reference: Truth | None = None,
    ) -> None:
        self._extractor = load_extractor(folder, extractor) if isinstance(extractor, str) else extractor
        if reference_world not in ("scenes", "digits"):
            raise EvalError(f"reference_world is {reference_world!r}; use scenes or digits")
        if reference is None and reference_folder is not None:
            reference = FolderReference(Path(reference_folder))
        elif reference is None and reference_world == "scenes":
            reference = Reference(reference_seed, reference_count)
        self._reference: Truth = reference or DigitsReference()
        self._parts: list[NDArray[np.float32]] = []
        self._clusters: list[str] = []
        self._sizes: list[int] = []

    def update(self, samples: Samples) -> None:
        height, width = samples.images.shape[-2:]
        if height != width or self._sizes[:1] not in ([], [height]):
            before = f" after {self._sizes[0]}" if self._sizes else ""
            raise EvalError(f"{self.name} got pictures of {width}×{height}{before}; give squares of one size")
        self._sizes.append(height)
        self._parts.append(self._extractor(samples.images))
        self._clusters += [prompt.id for prompt in samples.prompts]

    def compute(self) -> Score:
        n = sum(len(part) for part in self._parts)
        self._need(n, 2)
        if len(set(self._sizes)) > 1:
            raise EvalError(f"{self.name} got pictures of sizes {sorted(set(self._sizes))}; give squares of one size")
        size = self._sizes[0]
        features = np.concatenate(self._parts).astype(np.float64)
        if not np.isfinite(features).all():
            raise EvalError(f"{self._extractor.name} gave features that are not finite; look at the pictures")
        reference = self._reference.features(self._extractor, size)
        interval, influence = self._distance(features, reference)
        protocol = {
            "extractor": self._extractor.name,
            "weights": self._extractor.digest,
            "reference": self._reference.protocol,
            "size": size,
            "n": n,
            "torch-fidelity": version("torch-fidelity"),
            **self._more_protocol(),
        }
        return self._score(interval, influence, protocol, per_sample_kind=self.kind, parts=self._parts_of()).check()

    def _more_protocol(self) -> dict[str, Any]:
        return {}

    def _parts_of(self) -> dict[str, float]:
        """Further numbers, once the distance is known."""
        return {}

    def _distance(
        self, features: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[Interval, NDArray[np.float64]]:
        raise NotImplementedError


@register
class Fid(Distance):
    """Fréchet distance of Gaussians fitted to the features."""

    name = "fid"
    direction = "lower"
    unit = ""
    smallest_n = 10_000
    _curve: dict[str, float]

    def _parts_of(self) -> dict[str, float]:
        return self._curve

    def _distance(
        self, features: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[Interval, NDArray[np.float64]]:
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

        theirs = fid_features_to_statistics(torch.from_numpy(reference))

        def distance(part: NDArray[np.float64]) -> float:
            ours = fid_features_to_statistics(torch.from_numpy(part))
            return float(fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID])

        value = distance(features)
        self._curve = bias_curve(features, value, distance)
        influence = frechet_influence(features, theirs["mu"], theirs["sigma"])
        return normal_interval(value, clustered_se(influence, self._clusters), len(set(self._clusters))), influence


@register
class FdDinov2(Fid):
    """The same distance over DINOv2's class token, which tells apart what Inception confuses (arXiv 2306.04675)."""

    name = "fd-dinov2"

    def __init__(
        self,
        folder: Path | None = None,
        extractor: str | Extractor = "dinov2-vit-l-14",
        reference_folder: str | None = None,
        reference: Truth | None = None,
    ) -> None:
        super().__init__(folder, extractor, reference_folder=reference_folder, reference=reference)


def bias_curve(
    features: NDArray[np.float64], value: float, distance: Callable[[NDArray[np.float64]], float]
) -> dict[str, float]:
    """FID at a quarter, at half and at all of the samples, and the line in 1/n through them at n → ∞.

    FID(n) ≈ FID∞ + b/n (Chong and Forsyth 2020, arXiv 1911.07023). Each smaller n is the mean over disjoint parts. With
    fewer than 2·d samples the line does not hold (off by several points), so there is neither curve nor limit then.
    """
    n, d = features.shape
    if n // 4 < 2 * d:
        return {}
    order = np.random.default_rng(_KID_SEED).permutation(n)
    found = {n: value}
    for pieces in (2, 4):
        size = n // pieces
        parts = [features[order[i * size : (i + 1) * size]] for i in range(pieces)]
        found[size] = float(np.mean([distance(part) for part in parts]))
    _, limit = np.polyfit([1 / size for size in found], list(found.values()), 1)
    return {f"at {size}": value for size, value in sorted(found.items())} | {"extrapolated": float(limit)}


@register
class Kid(Distance):
    """Squared kernel distance, polynomial of degree 3, mean over torch-fidelity's seeded subsets."""

    name = "kid"
    direction = "lower"
    unit = ""
    smallest_n = 1_000

    def _distance(
        self, features: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[Interval, NDArray[np.float64]]:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

        found = kid_features_to_metric(
            torch.from_numpy(features),
            torch.from_numpy(reference),
            kid_subsets=_KID_SUBSETS,
            kid_subset_size=min(_KID_SUBSET_SIZE, len(features), len(reference)),
            rng_seed=_KID_SEED,
            verbose=False,
        )
        terms = kernel_terms(features, reference)
        # Total variance: that of the samples, and that of drawing finitely many subsets of them.
        drawn = found[KEY_METRIC_KID_STD] ** 2 / _KID_SUBSETS
        se = math.sqrt(terms.se(self._clusters) ** 2 + drawn)
        value = float(found[KEY_METRIC_KID_MEAN])
        return normal_interval(value, se, len(set(self._clusters))), terms.influence
