"""GenEval of real models: a detector finds things, CLIP names their colours, eval.geneval's rules judge.

The published detector is Mask2Former with a Swin-S backbone trained on COCO, in mmdet 2; here it is the same network in
transformers with its authors' weights (facebook/mask2former-swin-small-coco-instance), and the colours are those of
CLIP ViT-L/14 (openai/clip-vit-large-patch14) over GenEval's own templates. That both detectors give one score has not
been verified here, so the detector's name and digest are part of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from eval import judges
from eval.errors import EvalError
from eval.geneval import Found, by_task, is_right, read_wanted
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.composition import proportion

DETECTOR, NAMER = "mask2former-swin-small-coco-instance", "clip-vit-l-14"
SOURCES = {DETECTOR: f"facebook/{DETECTOR} of the hub", NAMER: "openai/clip-vit-large-patch14 of the hub"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_SHORT, _LONG, _DIVISOR, _QUERIES, _GREY = 800, 1333, 32, 100, 0x99
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Picture = NDArray[np.uint8]
"""(3, H, W)."""


class Eye(Protocol):
    """What sees pictures for GenEval."""

    def find(self, picture: Picture) -> Mapping[str, Sequence[Found]]: ...

    def colours(self, picture: Picture, things: Sequence[Found], name: str) -> Sequence[str]: ...


class Networks:
    """Mask2Former and CLIP from two folders of judges."""

    def __init__(self, folder: Path | None) -> None:
        from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

        paths = [_published(folder, name) for name in (DETECTOR, NAMER)]
        self.digest = "+".join(judges.digest(path)[:32] for path in paths)
        self._detector: Any = Mask2FormerForUniversalSegmentation.from_pretrained(paths[0], local_files_only=True)
        self._clip: Any = CLIPModel.from_pretrained(paths[1], local_files_only=True)
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(paths[1], local_files_only=True)
        labels: Any = self._detector.config.id2label
        self._names: dict[int, str] = {int(key): name for key, name in labels.items()}
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def find(self, picture: Picture) -> dict[str, list[Found]]:
        """Things by class; a thing's score is the class's probability times the mean probability inside its mask."""
        height, width = picture.shape[1:]
        pixels = _for_detector(picture)
        output = self._detector(pixel_values=pixels)
        chances = output.class_queries_logits[0].softmax(-1)[:, :-1]
        scores, order = chances.flatten().topk(min(_QUERIES, chances.numel()))
        logits = F.interpolate(output.masks_queries_logits, pixels.shape[-2:], mode="bilinear", align_corners=False)
        inner_height, inner_width = _resized(height, width)
        logits = F.interpolate(logits[..., :inner_height, :inner_width], (height, width), mode="bilinear")[0]
        found: dict[str, list[Found]] = {}
        for score, place in zip(scores.tolist(), order.tolist(), strict=True):
            query, label = divmod(place, chances.shape[1])
            mask = logits[query] > 0
            if mask.any():
                inside = float(logits[query].sigmoid()[mask].mean())
                found.setdefault(self._names[label], []).append(Found(_box(mask), score * inside, mask.numpy()))
        return found

    @torch.inference_mode()
    def colours(self, picture: Picture, things: Sequence[Found], name: str) -> list[str]:
        """The likeliest colour of each thing, cut out by its mask on grey."""
        if name not in self._classifiers:
            self._classifiers[name] = torch.stack([self._text(colour, name) for colour in COLOURS])
        size = self._clip.config.vision_config.image_size
        cuts = torch.cat([_for_clip(picture, thing, size) for thing in things])
        images = F.normalize(self._clip.get_image_features(pixel_values=cuts).pooler_output, dim=-1)
        return [COLOURS[i] for i in (images @ self._classifiers[name].T).argmax(-1).tolist()]

    def _text(self, colour: str, name: str) -> Tensor:
        texts = [template.format(colour, name) for template in _TEMPLATES]
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = F.normalize(self._clip.get_text_features(**tokens).pooler_output, dim=-1).mean(0)
        return F.normalize(features, dim=0)


def _published(folder: Path | None, name: str) -> Path:
    path = (folder or judges.DEFAULT_FOLDER) / name
    if not path.is_dir():
        raise EvalError(f"geneval was not run: {path} is missing; put {SOURCES[name]} there")
    return path


def _resized(height: int, width: int) -> tuple[int, int]:
    """Sides so that the shorter is 800 pixels, unless the longer would pass 1333."""
    scale = min(_SHORT / min(height, width), _LONG / max(height, width))
    return round(height * scale), round(width * scale)


def _for_detector(picture: Picture) -> Tensor:
    """(1, 3, H', W') standardised, padded at the right and below to multiples of 32."""
    pixels = torch.from_numpy(picture)[None].float()
    pixels = F.interpolate(pixels, _resized(*picture.shape[1:]), mode="bilinear", antialias=True)
    pixels = (pixels - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % _DIVISOR, 0, -height % _DIVISOR))


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _for_clip(picture: Picture, thing: Found, size: int) -> Tensor:
    """(1, 3, size, size): the thing on grey, cut to its box, shortest side to ``size``, middle cut out."""
    shown = picture if thing.mask is None else np.where(thing.mask, picture, np.uint8(_GREY))
    x0, y0, x1, y1 = (round(side) for side in thing.box)
    pixels = torch.from_numpy(np.ascontiguousarray(shown[:, y0:y1, x0:x1]))[None].float()
    scale = size / min(pixels.shape[-2:])
    sides = [max(size, round(side * scale)) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 255) / 255
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    return (pixels - torch.tensor(_CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(_CLIP_STD).view(1, 3, 1, 1)


@register
class GenEval(PerSampleMetric):
    """Share of pictures that show what GenEval's prompts ask for; parts: per task, and ``overall``, their mean."""

    name = "geneval"
    direction = "higher"
    unit = "%"
    smallest_n = 553

    def __init__(self, wanted: str = "data/geneval/evaluation_metadata.jsonl", folder: Path | None = None,
                 eye: Eye | None = None, identity: str = "") -> None:  # fmt: skip
        super().__init__()
        self._wanted = read_wanted(Path(wanted))
        if eye is None:
            networks = Networks(folder)
            eye, identity = networks, networks.digest
        self._eye, self._identity = eye, identity
        self._tasks: list[str] = []

    def update(self, samples: Samples) -> None:
        unknown = next((prompt.text for prompt in samples.prompts if prompt.text not in self._wanted), None)
        if unknown is not None:
            raise EvalError(f"geneval does not know what {unknown!r} asks for; use the suite geneval")
        right = []
        for picture, prompt in zip(samples.images, samples.prompts, strict=True):
            wanted = self._wanted[prompt.text]
            found = self._eye.find(picture)
            right.append(is_right(found, wanted, lambda things, name, p=picture: self._eye.colours(p, things, name)))  # type: ignore[misc]
            self._tasks.append(wanted.task)
        self._add(100.0 * np.array(right), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        parts = by_task([value > 0 for value in self._values], self._tasks)
        protocol = {"detector": DETECTOR, "colours": NAMER, "weights": self._identity}
        return self._score(proportion(values, self._clusters), values, protocol, parts=parts).check()
