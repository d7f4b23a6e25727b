"""FID and KID by torch-fidelity's own code, over any registered feature extractor.

An extractor is a module that maps uint8 pictures (B, 3, H, W) to features (B, D). The value is torch-fidelity's; the
interval is ours, from the influence of every picture on it, with the reference held fixed. Both distances fall with the
number of samples (FID's bias), so scores compare only at equal n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval import judges
from eval.errors import EvalError, nearest
from eval.metrics.base import Metric, PerSample, Samples, Score, register
from eval.prompts import EVALUATION_SEEDS
from eval.statistics import Interval, clustered_se, frechet_influence, kernel_terms, normal_interval

_BATCH = 128
_KID_SUBSETS, _KID_SUBSET_SIZE, _KID_SEED = 100, 1000, 2020

LOADERS: dict[str, Callable[[Path], nn.Module]] = {}


M = TypeVar("M", bound=nn.Module)


def register_extractor(name: str) -> Callable[[Callable[[Path], M]], Callable[[Path], M]]:
    """Make a feature extractor known: a function from the judge's folder to a module uint8 (B,3,H,W) -> (B, D)."""

    def add(loader: Callable[[Path], M]) -> Callable[[Path], M]:
        LOADERS[name] = loader
        return loader

    return add


class ClipImageTower(nn.Module):
    """The projected image embedding of a transformers CLIPModel, from uint8 pictures of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32, not normalised. Another size is resampled bicubically, antialiased."""
        pixels = images.float() / 255
        size: int = self.model.config.vision_config.image_size  # type: ignore[assignment, union-attr]
        if pixels.shape[-2:] != (size, size):
            pixels = nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        pooled = self.model.vision_model(pixel_values=(pixels - self.mean) / self.std).pooler_output  # type: ignore
        return self.model.visual_projection(pooled)  # type: ignore[operator, no-any-return]


@register_extractor("scenes-clip")
def load_clip(path: Path) -> nn.Module:
    """A CLIPModel folder; mean and std from its preprocessor_config.json, without one pixels enter in [−1, 1]."""
    import json

    from transformers import CLIPModel

    config = path / "preprocessor_config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    mean, std = (tuple(values.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
    return ClipImageTower(CLIPModel.from_pretrained(path, local_files_only=True), mean, std)


class Extractor:
    """A registered feature extractor, made through torch-fidelity, with a digest of its weights.

    Remembers the features of the last batch, so that FID and KID over the same samples run it once.
    """

    def __init__(self, name: str, module: nn.Module, digest: str) -> None:
        self.name, self.digest = name, digest
        self.network = _through_fidelity(f"{name}-{digest[:16]}", module)
        self._last: tuple[Any, NDArray[np.float32]] | None = None

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (B, D) of pictures (B, 3, H, W) uint8."""
        if self._last is None or self._last[0] is not images:
            with torch.inference_mode():
                parts = [self.network(torch.tensor(images[i : i + _BATCH]))[0] for i in range(0, len(images), _BATCH)]
            self._last = images, torch.cat(parts).numpy()
        return self._last[1]


def _through_fidelity(key: str, module: nn.Module) -> nn.Module:
    """Register the module with torch-fidelity under a key and let its registry make the extractor."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.module = module

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.module(images),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    FEATURE_EXTRACTORS_REGISTRY.pop(key, None)
    register_feature_extractor(key, Registered)
    return create_feature_extractor(key, ["features"], cuda=False, verbose=False)  # type: ignore[no-any-return]


@cache
def load_extractor(folder: Path | None, name: str) -> Extractor:
    """A registered extractor with its weights from a folder of judges; one per process."""
    if name not in LOADERS:
        raise EvalError(f"extractor {name!r} is unknown; {nearest(name, LOADERS)}")
    path = judges.find(folder, name)
    return Extractor(name, LOADERS[name](path), judges.digest(path))


class Reference:
    """Held-out renders of scenes: never a training stream. Features are kept on disk by extractor and size."""

    def __init__(self, seed: int, count: int) -> None:
        if seed not in EVALUATION_SEEDS:
            raise EvalError(
                f"reference_seed is {seed}, which may be a training stream; use one from {EVALUATION_SEEDS}"
            )
        self.seed, self.count = seed, count

    @property
    def protocol(self) -> dict[str, Any]:
        from distill.data.cache import WORLD_VERSION

        return {"world": "scenes", "version": WORLD_VERSION, "seed": self.seed, "count": self.count}

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(count, D) features of renders at size × size."""
        from distill.data.cache import WORLD_VERSION, cached_array, scene_images

        images = scene_images(self.seed, self.count, size)
        width = extractor(images[:1]).shape[1]
        name = f"features-scenes-{self.seed}-{self.count}-{size}-v{WORLD_VERSION}-{extractor.digest[:16]}"
        found = cached_array(name, (self.count, width), np.float32, lambda a, b: extractor(images[a:b]))
        return np.asarray(found, dtype=np.float64)


class DigitsReference:
    """All 1,797 scans of the digits, which is what their generators learn: too few to keep some of them out."""

    protocol: ClassVar[dict[str, Any]] = {"world": "digits", "count": 1797}

    def features(self, extractor: Extractor, size: int) -> NDArray[np.float64]:
        """(1797, D) features; the extractor of digits has refused any other size."""
        from distill.data.digits import load_digits
        from eval.metrics.digits import as_pictures

        return extractor(as_pictures(load_digits("all")[0])).astype(np.float64)


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
        reference: Reference | DigitsReference | None = None,
    ) -> None:
        self._extractor = load_extractor(folder, extractor) if isinstance(extractor, str) else extractor
        if reference_world not in ("scenes", "digits"):
            raise EvalError(f"reference_world is {reference_world!r}; use scenes or digits")
        scenes = reference_world == "scenes"
        self._reference = reference or (Reference(reference_seed, reference_count) if scenes else DigitsReference())
        self._parts: list[NDArray[np.float32]] = []
        self._clusters: list[str] = []
        self._size: int | None = None

    def update(self, samples: Samples) -> None:
        height, width = samples.images.shape[-2:]
        if height != width or self._size not in (None, height):
            raise EvalError(
                f"{self.name} got pictures of {width}×{height} after {self._size}; give squares of one size"
            )
        self._size = height
        self._parts.append(self._extractor(samples.images))
        self._clusters += [prompt.id for prompt in samples.prompts]

    def compute(self) -> Score:
        n = sum(len(part) for part in self._parts)
        self._need(n, 2)
        assert self._size is not None
        features = np.concatenate(self._parts).astype(np.float64)
        if not np.isfinite(features).all():
            raise EvalError(f"{self._extractor.name} gave features that are not finite; look at the pictures")
        reference = self._reference.features(self._extractor, self._size)
        interval, influence = self._distance(features, reference)
        protocol = {
            "extractor": self._extractor.name,
            "weights": self._extractor.digest,
            "reference": self._reference.protocol,
            "size": self._size,
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
