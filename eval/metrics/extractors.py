"""Feature extractors by name: modules that map uint8 pictures (B, 3, H, W), or clips (B, F, 3, H, W), to (B, D).

Each finds its weights in a folder of that name among the judges.

scenes-clip          the image tower of the embedded world's CLIP
scenes-motion        of clips: the maximum and mean over places and times that the labeller of motion reads
digits-cnn           the penultimate layer of the digits' judge (eval.metrics.digits)
inception-v3         torch-fidelity's port of the TensorFlow graph that FID is defined on
dinov2-vit-l-14      DINOv2's class token, for FD-DINOv2 (Stein et al., arXiv 2306.04675)
clip-vit-l-14-336    CLIP's projected embedding, for CMMD (Jayasumana et al., arXiv 2401.09603)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval import judges
from eval.errors import EvalError, nearest

_BATCH, _CLIP_BATCH = 128, 16

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


@register_extractor("clip-vit-l-14-336")
@register_extractor("scenes-clip")
def load_clip(path: Path) -> nn.Module:
    """A CLIPModel folder; mean and std from its preprocessor_config.json, without one pixels enter in [−1, 1]."""
    from transformers import CLIPModel

    config = path / "preprocessor_config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    mean, std = (tuple(values.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
    return ClipImageTower(CLIPModel.from_pretrained(path, local_files_only=True), mean, std)


class WatchedClips(nn.Module):
    """What the labeller of motion has pooled over all places and times of a clip, before it answers."""

    def __init__(self, labeller: Any) -> None:
        super().__init__()
        self.labeller = labeller

    def forward(self, clips: Tensor) -> Tensor:
        """(B, F, 3, H, W) uint8 -> (B, 8·width) float32."""
        parts = [self.labeller.pooled(part.transpose(1, 2).float() / 127.5 - 1) for part in clips.split(_CLIP_BATCH)]
        return torch.cat(parts)


@register_extractor("scenes-motion")
def load_motion(path: Path) -> nn.Module:
    from distill.motion import MotionLabeller

    return WatchedClips(MotionLabeller.load(path))


class Dinov2(nn.Module):
    """DINOv2's normalised class token, as the published network returns it."""

    def __init__(self, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32; the shortest side is made 224 pixels, and the middle is taken."""
        pixels = self.prepare(images.float() / 127.5 - 1)
        return self.model(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]


@register_extractor("dinov2-vit-l-14")
def load_dinov2(path: Path) -> nn.Module:
    """A folder of transformers' Dinov2Model."""
    from transformers import Dinov2Model

    from distill.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, FillAndCrop

    model = Dinov2Model.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return Dinov2(model, FillAndCrop(224, 224, IMAGENET_MEAN, IMAGENET_STD))


class Inception(nn.Module):
    """The 2048 pooled features of torch-fidelity's InceptionV3, which resizes to 299 as TensorFlow 1 did."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]  # type: ignore[no-any-return]


@register_extractor("inception-v3")
def load_inception(path: Path) -> nn.Module:
    """A folder with torch-fidelity's weights, one .pth or .safetensors.

    torch-fidelity unpickles whatever it is given, so it is given a file that was made here from tensors alone.
    """
    from torch_fidelity.utils import create_feature_extractor

    from distill.rewards.weights import read_tensors

    files = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors"))
    if len(files) != 1:
        raise EvalError(f"{path} holds {len(files)} files of weights; put torch-fidelity's one file there")
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "inception.pth"
        torch.save(read_tensors(files[0]), ours)
        network = create_feature_extractor(
            "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=str(ours)
        )
    return Inception(network)


PUBLISHED = {
    "inception-v3": "weights-inception-2015-12-05-6726825d.pth of the releases of toshas/torch-fidelity",
    "dinov2-vit-l-14": "facebook/dinov2-large of the hub",
    "clip-vit-l-14-336": "openai/clip-vit-large-patch14-336 of the hub",
}
"""Where weights that are not ours come from."""


class Extractor:
    """A registered feature extractor, made through torch-fidelity, with a digest of its weights.

    Remembers the features of the last batch, so that FID and KID over the same samples run it once.
    """

    def __init__(self, name: str, module: nn.Module, digest: str) -> None:
        self.name, self.digest = name, digest
        self.network = _through_fidelity(f"{name}-{digest[:16]}", module)
        self._last: tuple[Any, NDArray[np.float32]] | None = None

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (B, D) of pictures (B, 3, H, W) uint8, or of clips (B, F, 3, H, W)."""
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
    path = (folder or judges.DEFAULT_FOLDER) / name
    if name in PUBLISHED and not path.is_dir():
        raise EvalError(f"{name} was not run: {path} is missing; put {PUBLISHED[name]} there")
    path = judges.find(folder, name)
    return Extractor(name, LOADERS[name](path), judges.digest(path))
