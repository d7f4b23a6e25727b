"""The reward of the embedded digits: a small classifier's log-probability of the label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from distill.bundle import sha256
from distill.parallel.device import moved
from distill.rewards.base import check_counts


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8 × 8 digits. ``features`` is its penultimate layer, (B, 64)."""

    range = (-20.0, 0.0)
    requires_grad = True
    digest = ""

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
        check_counts(images, conditions, "label")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[int]) -> Tensor:
        labels = moved(torch.as_tensor(list(conditions), dtype=torch.int64), pixels.device)
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
        model.digest = sha256(path / "model.safetensors")
        return model.eval().requires_grad_(False)
