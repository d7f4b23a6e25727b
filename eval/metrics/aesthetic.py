"""LAION's aesthetic predictor: how much people would like a picture, whatever it was asked for, from 1 to 10.

    s = L_k(… L_1(e/‖e‖)),   e = CLIP ViT-L/14's projected embedding of the picture

with linear layers L_i and nothing between them (christophschuhmann/improved-aesthetic-predictor). VBench's aesthetic
quality is the same with one layer, over ten. It does not see the prompt, and students that please it lose variety:
report it beside diversity and an alignment score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from eval import judges
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean

CLIP, HEAD = "clip-vit-l-14", "aesthetic-predictor"
SOURCES = {
    CLIP: "openai/clip-vit-large-patch14 of the hub",
    HEAD: "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor",
}
_BATCH = 32


class Predictor(nn.Module):
    """(B, 3, H, W) uint8 -> (B,) float32."""

    def __init__(self, clip: nn.Module, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        from distill.rewards.pixels import FillAndCrop

        super().__init__()
        size: int = clip.config.vision_config.image_size  # type: ignore[assignment, union-attr]
        self.clip, self.layers, self.prepare = clip.eval(), layers, FillAndCrop(size, size)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.clip.vision_model(pixel_values=self.prepare(images.float() / 127.5 - 1)).pooler_output  # type: ignore
        x = normalize(self.clip.visual_projection(pooled), dim=-1)  # type: ignore[operator]
        for weight, bias in self.layers:
            x = linear(x, weight, bias)
        return x[:, 0]


def layers_of(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The linear layers of a head in order: layers.0.weight, layers.0.bias, layers.2.weight …, or weight and bias."""
    stems = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda stem: [int(part) for part in stem.split(".") if part.isdigit()],
    )
    try:
        layers = [(tensors[f"{stem}weight"].float(), tensors[f"{stem}bias"].float()) for stem in stems]
    except KeyError as error:
        raise EvalError(f"the aesthetic predictor lacks {error}; use {SOURCES[HEAD]}") from None
    if not layers or layers[-1][0].shape[0] != 1:
        raise EvalError(f"the aesthetic predictor holds {sorted(tensors)}, which give no score; use {SOURCES[HEAD]}")
    return layers


def load(folder: Path | None) -> tuple[Predictor, str]:
    """The predictor from a folder of judges, and the digest of both parts."""
    from transformers import CLIPModel

    from distill.rewards.weights import read_tensors

    paths = {name: (folder or judges.DEFAULT_FOLDER) / name for name in SOURCES}
    for name, path in paths.items():
        if not path.is_dir():
            raise EvalError(f"aesthetic was not run: {path} is missing; put {SOURCES[name]} there")
    files = sorted(p for p in paths[HEAD].iterdir() if p.suffix in (".pth", ".pt", ".safetensors"))
    if len(files) != 1:
        raise EvalError(f"{paths[HEAD]} holds {len(files)} files of weights; put {SOURCES[HEAD]} there")
    clip = CLIPModel.from_pretrained(paths[CLIP], local_files_only=True, dtype=torch.float32)
    identity = "+".join(judges.digest(path) for path in paths.values())
    return Predictor(clip, layers_of(read_tensors(files[0]))), identity


@register
class Aesthetic(PerSampleMetric):
    """Mean over prompts of the predictor's answers."""

    name = "aesthetic"
    direction = "higher"
    unit = ""
    smallest_n = 100

    def __init__(self, folder: Path | None = None, predictor: nn.Module | None = None, identity: str = "") -> None:
        super().__init__()
        if predictor is None:
            predictor, identity = load(folder)
        self._predictor, self._identity = predictor, identity

    def update(self, samples: Samples) -> None:
        with torch.inference_mode():
            parts = [self._predictor(part) for part in torch.tensor(samples.images).split(_BATCH)]
        self._add(torch.cat(parts).numpy(), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        return self._score(bootstrap_mean(values, self._clusters), values, {"weights": self._identity}).check()
