"""What published rewards do to a picture before their network sees it: equal to theirs, and differentiable.

The references resize 8-bit pictures with Pillow or float tensors with torch; both are bicubic with antialiasing. Where
a reference works on 8 bits, Pillow clips and rounds to whole levels after its pass along rows and again after its pass
along columns, which ``whole_levels`` repeats with the gradient of the clipped value (straight-through): what is left is
a level or two here and there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from distill.parallel.device import moved

Prepare = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) float32 in [−1, 1] to a network's input (B, 3, S, S) float32."""
Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


def whole_levels(x: Tensor) -> Tensor:
    """x in [0, 1] clipped and rounded to multiples of 1/255; its gradient is that of the clipped x."""
    clipped = x.clamp(0.0, 1.0)
    return clipped + ((clipped * 255).round() / 255 - clipped).detach()


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow and torchvision do; (B, 3, H, W) -> (B, 3, height, width)."""
    if x.shape[-2:] == (height, width):
        return x
    return interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def normalised(x: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(x − mean)/std per channel."""
    m, s = (moved(torch.tensor(three), x.device) for three in (mean, std))
    return (x - m[:, None, None]) / s[:, None, None]


@dataclass(frozen=True)
class FitAndPad:
    """HPSv2's: the longest side to ``size``, in float without clipping, then black bars to a square.

    The reference leaves out the bars where the longest side already is ``size`` and then fails; they are always added.
    """

    size: int = 224
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def __call__(self, pixels: Tensor) -> Tensor:
        x = (pixels.float() + 1) / 2
        scale = self.size / max(x.shape[-2:])
        height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
        x = resized(x, height, width)
        across, down = self.size - width, self.size - height
        x = pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return normalised(x, self.mean, self.std)


@dataclass(frozen=True)
class FillAndCrop:
    """CLIP's, BLIP's and DINOv2's: the shortest side to ``resize`` in 8 bits, then the middle ``size`` × ``size``."""

    size: int = 224
    resize: int = 224
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    centre: Literal["transformers", "torchvision"] = "transformers"
    """Where the middle of an odd margin is: transformers rounds down, torchvision to the nearest even number."""

    def __call__(self, pixels: Tensor) -> Tensor:
        x = whole_levels((pixels.float() + 1) / 2)
        short = min(x.shape[-2:])
        height, width = (int(self.resize * side / short) for side in x.shape[-2:])
        x = whole_levels(resized(x, x.shape[-2], width))
        x = whole_levels(resized(x, height, width))
        top, left = self._margin(height), self._margin(width)
        return normalised(x[..., top : top + self.size, left : left + self.size], self.mean, self.std)

    def _margin(self, side: int) -> int:
        if side < self.size:
            raise ValueError(f"resize is {self.resize}, less than the crop's size {self.size}; give at least the size")
        margin = side - self.size
        return margin // 2 if self.centre == "transformers" else round(margin / 2)


def plain(pixels: Tensor) -> Tensor:
    """Nothing: the embedded rewards read pictures in [−1, 1] at their own size."""
    return pixels
