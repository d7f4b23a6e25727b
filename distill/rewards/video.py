"""The reward of the embedded video world, in HPSv2's form: 100 × cosine of a clip and its caption.

The place of VideoAlign: it falls with quality (blur, noise), with motion (frozen, shaken, flickering, out of order) and
with what the caption says of things and of their motion. recipes/scenes-video-reward.yaml trains it.

A folder of ours holds the tower's weights and config.json, and the text encoder with its tokenizer in text_encoder/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, UMT5EncoderModel

from distill.motion import ClipTrunk
from distill.parallel.device import moved
from distill.rewards.base import check_counts
from distill.rewards.weights import weights_digest

KIND = "video-reward"


class VideoTower(nn.Module):
    """A clip and the state of a caption's end token as vectors of one space."""

    def __init__(self, width: int, layers: int, text_width: int, projection: int, grid: tuple[int, int, int]) -> None:
        """grid: (frames, rows, columns) of the trunk's output, as ``ClipTrunk.grid`` tells."""
        super().__init__()
        self.settings = {
            "width": width,
            "layers": layers,
            "text_width": text_width,
            "projection": projection,
            "grid": list(grid),
        }
        self.trunk, inner = ClipTrunk(width), 4 * width
        self.place = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1] * grid[2], inner))
        self.summary = nn.Parameter(0.02 * torch.randn(1, inner))
        layer = nn.TransformerEncoderLayer(
            inner, inner // 32, 2 * inner, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(inner), enable_nested_tensor=False)
        self.clip_projection = nn.Linear(inner, projection, bias=False)
        self.text_projection = nn.Linear(text_width, projection, bias=False)

    def see(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [−1, 1] to their summaries (B, 4·width)."""
        tokens = self.trunk(clips).flatten(2).transpose(1, 2) + self.place
        summary = self.summary.expand(len(clips), 1, -1).to(tokens.dtype)
        return self.body(torch.cat((summary, tokens), 1))[:, 0]  # type: ignore[no-any-return]

    def vectors(self, seen: Tensor) -> Tensor:
        return normalize(self.clip_projection(seen).float(), dim=-1)

    def words(self, states: Tensor) -> Tensor:
        return normalize(self.text_projection(states).float(), dim=-1)


def caption_states(encoder: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """The states of end tokens, (B, D); a caption that comes twice is read once."""
    distinct = list(dict.fromkeys(captions))
    tokens = tokenizer(distinct, padding=True, truncation=True, return_tensors="pt").to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    row = {caption: i for i, caption in enumerate(distinct)}
    index = moved(torch.tensor([row[caption] for caption in captions]), states.device)
    ends = tokens.attention_mask.sum(1) - 1
    return states[torch.arange(len(distinct), device=states.device), ends][index]  # type: ignore[no-any-return]


class VideoReward:
    """100 × cosine of clip and caption."""

    range, requires_grad, video = (-100.0, 100.0), True, True

    def __init__(self, tower: VideoTower, encoder: Any, tokenizer: Any, name: str, digest: str = "") -> None:
        """encoder: UMT5EncoderModel."""
        self.tower, self.encoder = tower.eval().requires_grad_(False), encoder.eval().requires_grad_(False)
        self.tokenizer, self.name, self.digest = tokenizer, name, digest

    def to(self, device: str | torch.device) -> VideoReward:
        self.tower.to(device)
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        """Clips (B, 3, F, H, W) uint8 to (B,)."""
        check_counts(images, conditions, "prompt")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[str]) -> Tensor:
        words = self.tower.words(caption_states(self.encoder, self.tokenizer, conditions))
        return 100.0 * (self.tower.vectors(self.tower.see(pixels)) * words).sum(-1)

    def save(self, folder: Path, accuracy: dict[str, float]) -> None:
        """Weights in float16, config.json with the measured accuracy; the text encoder is written beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.tower.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        config = {"kind": KIND, **self.tower.settings, "accuracy": accuracy}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> VideoReward:
        path = Path(folder)
        config = json.loads((path / "config.json").read_text())
        sizes = (config["width"], config["layers"], config["text_width"], config["projection"], tuple(config["grid"]))
        tower = VideoTower(*sizes)
        tower.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
        encoder = UMT5EncoderModel.from_pretrained(path / "text_encoder", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path / "text_encoder" / "tokenizer")
        return cls(tower, encoder, tokenizer, path.name, weights_digest(path))
