"""Colour, contrast and fine detail beside the truth's: how students of few steps fail without any judge noticing.

    saturation        c = mean over pixels of (max − min of R, G, B)/255
    contrast          c = standard deviation of the luminance (ITU-R BT.709)
    high-frequency    c = share of the luminance's spectral energy beyond a quarter of a cycle per pixel, mean left out

    score = 100·|mean(c)/mean(c of the reference) − 1|

Distillation with a strong guidance oversaturates, distillation by regression blurs, an adversary adds fine noise: the
mean moves to one side or the other, and either is worse. ``signed`` among the parts says to which. No network judges.
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.errors import EvalError
from eval.metrics.base import register
from eval.metrics.extractors import Extractor
from eval.metrics.fid import Distance
from eval.metrics.references import Truth
from eval.prompts import EVALUATION_SEEDS
from eval.statistics import Interval, clustered_se, normal_interval

Array = NDArray[np.float64]
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_FINE = 0.25
"""Cycles per pixel: half of what a grid of pixels can hold."""
_VERSION = "tone-1"


class Tone(nn.Module):
    """(B, 3, H, W) uint8 -> (B, 3) float32: the three statistics of each picture; a flat one has no fine detail."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        light = (pixels * torch.tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(dim=1)
        light = light - light.mean(dim=(1, 2), keepdim=True)
        energy = torch.fft.fft2(light).abs().square()
        rows, columns = (torch.fft.fftfreq(side) for side in light.shape[-2:])
        fine = torch.hypot(rows[:, None], columns[None]) > _FINE
        total = energy.sum(dim=(1, 2))
        share = (energy * fine).sum(dim=(1, 2)) / total.clamp(min=torch.finfo(total.dtype).tiny)
        chroma = (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2))
        return torch.stack([chroma, light.square().mean(dim=(1, 2)).sqrt(), share], dim=1)


@cache
def _tone() -> Extractor:
    """One for all three, so that a batch is looked at once."""
    return Extractor("tone", Tone(), _VERSION)


class _Tone(Distance):
    """What the three share; column: of Tone's answer."""

    direction = "lower"
    unit = "%"
    smallest_n = 1_000
    column: ClassVar[int]
    _parts_found: dict[str, float]

    def __init__(
        self,
        reference_seed: int = EVALUATION_SEEDS.stop - 1,
        reference_count: int = 2_000,
        reference_world: Literal["scenes", "digits"] = "scenes",
        reference_folder: str | None = None,
        reference: Truth | None = None,
    ) -> None:
        super().__init__(None, _tone(), reference_seed, reference_count, reference_world, reference_folder, reference)

    def _parts_of(self) -> dict[str, float]:
        return self._parts_found

    def _distance(self, features: Array, reference: Array) -> tuple[Interval, Array]:
        values, theirs = features[:, self.column], float(reference[:, self.column].mean())
        if not theirs > 0:
            raise EvalError(f"{self.name} of the reference is {theirs:g}, with which nothing compares; leave it out")
        level = float(values.mean())
        signed = 100 * (level / theirs - 1)
        influence = math.copysign(100 / theirs, signed) * (values - level)
        self._parts_found = {"signed": signed, "mean": level, "reference": theirs}
        se = clustered_se(influence, self._clusters)
        return normal_interval(abs(signed), se, len(set(self._clusters))), influence


@register
class Saturation(_Tone):
    """How much more or less colourful than the truth."""

    name = "saturation"
    column = 0


@register
class Contrast(_Tone):
    """How much more or less contrast than the truth."""

    name = "contrast"
    column = 1


@register
class HighFrequency(_Tone):
    """How much more or less fine detail than the truth."""

    name = "high-frequency"
    column = 2
