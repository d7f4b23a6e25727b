"""Rewards: networks that score pictures against their conditions. Training and evaluation import the same code.

    reward = load_reward("models/scenes-reward")
    reward.score(images, prompts)          # images (B, 3, H, W) uint8 -> (B,) float32

A folder's config.json decides what it is: a transformers CLIPModel (HPSv2's form, 100 × cosine) or a digit classifier
(log-probability of the label).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize
from transformers import CLIPModel, CLIPTokenizer


class Reward(Protocol):
    """Scores pictures (B, 3, H, W) uint8 against prompts or labels; larger is better; (B,) float32."""

    name: str
    range: tuple[float, float]
    requires_grad: bool

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor: ...

    def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
        """The same of float pictures in [−1, 1], with a graph; only where ``requires_grad`` is true."""
        ...


class ClipReward:
    """100 × cosine of picture and caption, as HPSv2 scores."""

    range = (-100.0, 100.0)
    requires_grad = True

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, name: str) -> None:
        self.clip, self.tokenizer, self.name = clip.eval().requires_grad_(False), tokenizer, name

    @classmethod
    def load(cls, folder: str | Path) -> ClipReward:
        path = Path(folder)
        clip = CLIPModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        return cls(clip, CLIPTokenizer.from_pretrained(path / "tokenizer"), path.name)

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        if len(images) != len(conditions):
            raise ValueError(f"{len(images)} pictures and {len(conditions)} prompts; give one prompt per picture")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[str]) -> Tensor:
        return 100.0 * clip_cosine(self.clip, self.tokenizer, pixels, list(conditions))


def image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit vectors (B, P) float32 of pictures (B, 3, H, W) in [−1, 1], differentiable."""
    return normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output).float(), dim=-1)


def text_features(clip: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Unit vectors (B, P) float32 of captions."""
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def clip_cosine(clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine of pictures (B, 3, H, W) in [−1, 1] and their captions: (B,), differentiable."""
    return (image_features(clip, pixels) * text_features(clip, tokenizer, prompts)).sum(-1)


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8 × 8 digits. ``features`` is its penultimate layer, (B, 64)."""

    range = (-20.0, 0.0)
    requires_grad = True

    def __init__(self, width: int = 32, name: str = "digits") -> None:
        super().__init__()
        self.width, self.name = width, name
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 1 or 3, 8, 8) uint8 in [0, 255] -> (B, 64) float32."""
        return self.body(images[:, :1].float() / 127.5 - 1.0)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of uint8 pictures."""
        return self.head(self.features(images))  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[int]) -> Tensor:
        """log p(label | picture)."""
        if len(images) != len(conditions):
            raise ValueError(f"{len(images)} pictures and {len(conditions)} labels; give one label per picture")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[int]) -> Tensor:
        labels = torch.as_tensor(list(conditions), dtype=torch.int64)
        return log_softmax(self.head(self.body(pixels[:, :1])), 1).gather(1, labels[:, None])[:, 0]

    def save(self, folder: Path, accuracy: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        config = {"kind": "digit-classifier", "width": self.width, "accuracy": accuracy}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> DigitClassifier:
        path = Path(folder)
        config = json.loads((path / "config.json").read_text())
        model = cls(config["width"], path.name)
        model.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
        return model.eval().requires_grad_(False)


def load_reward(folder: str | Path) -> Any:
    """The reward in a folder. Raises ValueError for a folder that holds none."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("kind") == "digit-classifier":
        return DigitClassifier.load(folder)
    if config.get("model_type") == "clip":
        return ClipReward.load(folder)
    raise ValueError(f"{folder} holds no reward; give a folder with a CLIPModel or a digit classifier")
