"""The labeller: a small detector, trained on exact labels, that says what a picture of the scenes world shows.

It is the judge of compositional accuracy, the held-out metric: no model is ever trained on its answers.

    labeller = Labeller.load("models/scenes-labeller")
    labeller.detect(images)        # (B, 3, 64, 64) uint8 -> per picture a list of Detection
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from distill.data.world import COLOURS, MATERIALS, SHAPES, SIZES

STRIDE = 4
ATTRIBUTES = (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("material", MATERIALS))
_CHANNELS = 1 + sum(len(values) for _, values in ATTRIBUTES) + 2


@dataclass(frozen=True)
class Detection:
    """One thing found: its attributes, ground position (units) and the detector's confidence in [0, 1]."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    z: float
    score: float


class Judge(nn.Module):
    """A network of one width that lies in a folder: model.safetensors in float16, and config.json with its accuracy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it in float32, frozen."""
        folder = Path(path)
        judge = cls(json.loads((folder / "config.json").read_text())["width"])
        state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        judge.load_state_dict(state)
        return judge.eval().requires_grad_(False)

    def save(self, path: str | Path, accuracy: dict[str, float]) -> None:
        """Write it, with the accuracy that was measured."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"width": self.width, "accuracy": accuracy}, indent=1) + "\n")


class Labeller(Judge):
    """A convolutional detector with one prediction per 4 × 4 pixels: objectness, attributes, ground position."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.SiLU(), _Residual(width), _Residual(width))
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.SiLU(), *(_Residual(2 * width, d) for d in (1, 2, 1, 2, 1))
        )
        self.head = nn.Conv2d(2 * width, _CHANNELS, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W) in [−1, 1]. Returns logits (B, k, H/4, W/4) per attribute, "object" and "position"."""
        out = self.head(self.body(self.stem(images)))
        sizes = [1, *(len(values) for _, values in ATTRIBUTES), 2]
        names = ["object", *(name for name, _ in ATTRIBUTES), "position"]
        return dict(zip(names, out.split(sizes, 1), strict=True))

    @torch.no_grad()
    def detect(self, images: Tensor, threshold: float = 0.5) -> list[list[Detection]]:
        """What each picture shows: local maxima of objectness above ``threshold``. images: (B, 3, H, W) uint8."""
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(f"images is {tuple(images.shape)} {images.dtype}; give (B, 3, H, W) uint8")
        found: list[list[Detection]] = [[] for _ in images]
        for start in range(0, len(images), 256):
            out = self(images[start : start + 256].float() / 127.5 - 1)
            logit = out["object"]  # probabilities of sure neighbours would both round to 1
            peak = (logit == max_pool2d(logit, 3, 1, 1)) & (logit.sigmoid() > threshold)
            for b, _, row, column in peak.nonzero().tolist():
                cell = {name: value[b, :, row, column] for name, value in out.items()}
                named = {name: values[int(cell[name].argmax())] for name, values in ATTRIBUTES}
                x, z = cell["position"].tolist()
                found[start + b].append(Detection(**named, x=x, z=z, score=float(cell["object"].sigmoid())))
        return found


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]
