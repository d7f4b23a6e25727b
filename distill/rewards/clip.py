"""Rewards that are a CLIPModel: cosine of picture and caption, times a factor.

| reward | factor | picture | source |
|---|---|---|---|
| a folder of ours | 100 | as it is, in [−1, 1] | trained by recipes/scenes-reward.yaml |
| ``clip`` | 100 | the model's own processor | Hessel et al., arXiv 2104.08718, there 2.5·max(cos, 0) |
| ``pickscore`` | exp(logit_scale) | CLIP's processor | Kirstain et al., arXiv 2305.01569; about 18 to 24 |
| ``hpsv2``, ``hpsv2.1`` | 100 | distill.rewards.pixels.FitAndPad | distill.rewards.hpsv2 |

A cosine below zero is kept, since its gradient is wanted; CLIP score as a metric clips it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from distill.parallel.device import moved
from distill.rewards.base import check_counts
from distill.rewards.pixels import CLIP_MEAN, CLIP_STD, FillAndCrop, Prepare, plain
from distill.rewards.weights import WeightsError, find_folder, weights_digest

CLIP_SOURCE = "openai/clip-vit-large-patch14"
PICKSCORE_SOURCE = "yuvalkirstain/PickScore_v1"
TOKENIZER_SOURCE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""PickScore and HPSv2 publish weights without a tokenizer; both start from this model and read with its tokenizer."""
END = "<|endoftext|>"


class ClipReward:
    """factor × cosine of picture and caption; 100 × as HPSv2 scores."""

    requires_grad = True

    def __init__(
        self,
        clip: Any,
        tokenizer: Any,
        name: str,
        *,
        prepare: Prepare = plain,
        factor: float = 100.0,
        digest: str = "",
    ) -> None:
        """clip: CLIPModel; tokenizer: CLIPTokenizer."""
        self.clip, self.tokenizer, self.name = clip.eval().requires_grad_(False), tokenizer, name
        self.prepare, self.factor, self.digest = prepare, factor, digest

    @property
    def range(self) -> tuple[float, float]:
        return (-self.factor, self.factor)

    @classmethod
    def load(cls, folder: str | Path) -> ClipReward:
        """One of ours: weights and config.json in the folder, its tokenizer under tokenizer/."""
        path = Path(folder)
        clip = CLIPModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        return cls(clip, tokenizer, path.name, digest=weights_digest(path))

    def to(self, device: str | torch.device) -> ClipReward:
        self.clip.to(device)
        return self

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        check_counts(images, conditions, "prompt")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[str]) -> Tensor:
        return self.factor * clip_cosine(self.clip, self.tokenizer, self.prepare(pixels), list(conditions))


def image_features(clip: Any, pixels: Tensor) -> Tensor:
    """Unit vectors (B, P) float32 of a CLIPModel's input (B, 3, S, S), differentiable."""
    return normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output).float(), dim=-1)


def text_features(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Unit vectors (B, P) float32 of captions; a caption that comes twice is read once."""
    distinct = list(dict.fromkeys(prompts))
    ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    device = clip.text_projection.weight.device
    vectors = normalize(
        clip.text_projection(clip.text_model(input_ids=moved(ids, device)).pooler_output).float(), dim=-1
    )
    row = {prompt: i for i, prompt in enumerate(distinct)}
    return vectors[moved(torch.tensor([row[prompt] for prompt in prompts]), device)]


def clip_cosine(clip: Any, tokenizer: Any, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine of a CLIPModel's input (B, 3, S, S) and captions: (B,), differentiable."""
    return (image_features(clip, pixels) * text_features(clip, tokenizer, prompts)).sum(-1)


def load_clip_score(source: str | Path = CLIP_SOURCE) -> ClipReward:
    """100 × cosine of a published CLIPModel: a folder or hub id with its tokenizer and processor."""
    return published(source, "clip", tokenizer=source)


def load_pickscore(source: str | Path = PICKSCORE_SOURCE) -> ClipReward:
    """exp(logit_scale) × cosine. The tokenizer is the folder's own if it has one."""
    own = (Path(source) / "tokenizer_config.json").is_file()
    reward = published(source, "pickscore", tokenizer=source if own else TOKENIZER_SOURCE)
    reward.factor = float(reward.clip.logit_scale.exp())
    return reward


def published(source: str | Path, name: str, *, tokenizer: str | Path) -> ClipReward:
    """A CLIPModel in a transformers folder or hub repository, with CLIP's preprocessing. Raises WeightsError."""
    folder = find_folder(source, name)
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"{name}: {folder} does not load as a CLIPModel ({first}); give another folder") from None
    words = load_tokenizer(tokenizer, name, clip)
    return ClipReward(clip, words, name, prepare=processor_of(folder, clip), digest=weights_digest(folder))


def load_tokenizer(source: str | Path, purpose: str, clip: Any) -> Any:
    """CLIP's byte-pair tokenizer of 77 tokens from a folder or hub id. Raises WeightsError.

    It pads with the end token, which a causal tower that pools at the first one never sees. Some published configs pad
    with "!", which makes every "!" of a prompt a padding token. Where files are missing transformers makes a tokenizer
    of nearly no words, so its size is compared with the text tower's.
    """
    folder = find_folder(source, f"{purpose}'s tokenizer", weights=False)
    expected = int(clip.config.text_config.vocab_size)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token=END)
        found = f"{len(tokenizer)} tokens for a text tower of {expected}"
    except (OSError, ValueError):
        tokenizer, found = None, "no tokenizer"
    if tokenizer is None or len(tokenizer) != expected:
        raise WeightsError(
            f"{purpose}: {str(source)!r} gives {found}; put tokenizer_config.json, vocab.json and merges.txt beside "
            f"the weights, or run: hf download {TOKENIZER_SOURCE}"
        )
    return tokenizer


def processor_of(folder: str | Path, clip: Any) -> FillAndCrop:
    """The preprocessing that preprocessor_config.json names; CLIP's own where there is none."""
    size = int(clip.config.vision_config.image_size)
    return read_processor(folder, size)


def read_processor(
    folder: str | Path,
    size: int,
    resize: int | None = None,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> FillAndCrop:
    """preprocessor_config.json as FillAndCrop; the arguments stand in for what it leaves out."""
    path = Path(folder) / "preprocessor_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("resample", 3) != 3 or not config.get("do_center_crop", True):
        raise WeightsError(f"{path} asks for another resampling than bicubic or for no crop; this reward knows neither")
    crop, edge = config.get("crop_size", size), config.get("size", resize or size)
    crop = crop["height"] if isinstance(crop, dict) else crop
    edge = edge.get("shortest_edge") or edge["height"] if isinstance(edge, dict) else edge
    return FillAndCrop(int(crop), int(edge), _triple(config, "image_mean", mean), _triple(config, "image_std", std))


def _triple(config: dict[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in config.get(key, default))
    return (red, green, blue)
