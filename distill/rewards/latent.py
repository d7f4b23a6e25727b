"""A reward that scores latents without decoding them: a CLIP-like reward whose image tower reads latents.

    reward = load_reward("models/scenes-latent-reward")
    reward.score_latents(latents, prompts)          # (B, C, h, w) float32 in model scale -> (B,) float32

Its score has the form of the reward that it imitates, factor × cosine of picture and caption, with that one's own text
tower. The image tower starts as that one's own too, with convolutions over latents in the place of its patch embedding,
and is trained until both say the same of a picture and of its latents (recipes/scenes-latent-reward.yaml). A cheap
variant of AMD's reward that is ours; the paper decodes and scores every sample, as far as is known.

A folder of ours holds weights, config.json and the tokenizer in tokenizer/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.config import RecipeError
from distill.reward_names import LATENT_KIND
from distill.rewards.base import check_counts
from distill.rewards.clip import clip_cosine
from distill.rewards.weights import weights_digest


class LatentStem(nn.Module):
    """Latents (B, C, h, w) to what a CLIP's patch embedding makes of their picture, (B, D, h / patch, w / patch)."""

    def __init__(self, channels: int, width: int, patch: int, out: int) -> None:
        super().__init__()
        self.before = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()
        )
        self.patches = nn.Conv2d(width, out, patch, stride=patch)

    @property
    def weight(self) -> Tensor:
        """CLIPModel asks its patch embedding for the dtype in which it computes."""
        return self.patches.weight

    def forward(self, latents: Tensor) -> Tensor:
        return self.patches(self.before(latents))  # type: ignore[no-any-return]


def latent_clip(clip: Any, shape: tuple[int, int, int], width: int) -> Any:
    """A copy of a CLIPModel that reads latents of ``shape`` = (C, h, w); its stem of ``width`` channels alone is new.

    A patch is as many latents as give the tower the grid that it knows. Raises RecipeError where none does.
    """
    vision = clip.config.vision_config
    channels, height, side = shape
    grid = vision.image_size // vision.patch_size
    if height != side or side % grid:
        raise RecipeError(
            f"latents of {height} × {side} do not divide into the reward's {grid} × {grid} patches; use square ones "
            f"with a multiple of {grid} on a side (data.size), or another reward"
        )
    config = copy.deepcopy(clip.config)
    for key, value in {"num_channels": channels, "image_size": side, "patch_size": side // grid}.items():
        setattr(config.vision_config, key, value)
    made = _blank(config, width)
    own = made.state_dict()
    made.load_state_dict({name: v for name, v in clip.state_dict().items() if name in own}, strict=False)
    return made


def _blank(config: Any, width: int) -> Any:
    """A CLIPModel of random weights with a stem in the place of its patch embedding."""
    config._attn_implementation = "eager"
    clip: Any = CLIPModel(config)
    vision = config.vision_config
    clip.vision_model.embeddings.patch_embedding = LatentStem(
        vision.num_channels, width, vision.patch_size, vision.hidden_size
    )
    return clip


class LatentReward:
    """factor × cosine of latents and caption."""

    requires_grad = True

    def __init__(
        self, clip: Any, tokenizer: Any, name: str, *, factor: float, scale: float, imitates: str = "", digest: str = ""
    ) -> None:
        """clip: what ``latent_clip`` makes; tokenizer: CLIPTokenizer; scale: the autoencoder's scaling factor.

        imitates: digest of the reward of pictures.
        """
        self.clip, self.tokenizer, self.name = clip.eval().requires_grad_(False), tokenizer, name
        self.factor, self.scale, self.imitates, self.digest = factor, scale, imitates, digest

    @property
    def range(self) -> tuple[float, float]:
        return (-self.factor, self.factor)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of its latents."""
        vision = self.clip.config.vision_config
        return (vision.num_channels, vision.image_size, vision.image_size)

    def to(self, device: str | torch.device) -> LatentReward:
        self.clip.to(device)
        return self

    def score_latents(self, latents: Tensor, conditions: Sequence[str]) -> Tensor:
        """Latents (B, C, h, w) float in model scale to (B,) float32, with a graph."""
        check_counts(latents, conditions, "prompt")
        return self.factor * clip_cosine(self.clip, self.tokenizer, latents, list(conditions))

    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        """Raises ValueError: it knows no pictures."""
        raise ValueError(f"{self.name} scores latents, not pictures; give the reward of pictures that it imitates")

    def check(self, family: Any) -> None:
        """Raises RecipeError unless a family's latents have this reward's channels, size and scale."""
        shape, config = family.latent_shape(), getattr(getattr(family, "vae", None), "config", None)
        scale = getattr(config, "scaling_factor", None)
        if (shape, scale) != (self.shape, self.scale):
            raise RecipeError(
                f"{self.name} scores latents of {self.shape} at a scaling factor of {self.scale}, and those of the "
                f"teacher ({family.name}) are {shape} at {scale}; train a latent reward with the teacher's autoencoder "
                "and size, or name a reward of pictures"
            )

    def save(self, folder: Path, accuracy: Mapping[str, float]) -> None:
        """Weights in float16, config.json with the measured accuracy, and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.clip.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        config = {
            "kind": LATENT_KIND,
            "width": self.clip.vision_model.embeddings.patch_embedding.patches.in_channels,
            "factor": self.factor,
            "scaling_factor": self.scale,
            "imitates": self.imitates,
            "accuracy": dict(accuracy),
            "clip": json.loads(self.clip.config.to_json_string()),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @classmethod
    def load(cls, folder: str | Path) -> LatentReward:
        path = Path(folder)
        config = json.loads((path / "config.json").read_text())
        clip = _blank(CLIPConfig.from_dict(config["clip"]), config["width"])
        clip.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
        return cls(
            clip,
            CLIPTokenizer.from_pretrained(path / "tokenizer"),
            path.name,
            factor=config["factor"],
            scale=config["scaling_factor"],
            imitates=config["imitates"],
            digest=weights_digest(path),
        )


@torch.no_grad()
def scores_of(
    judges: Sequence[Any], latents: Tensor, conditions: Sequence[Any], decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scores (judges, B) float32 of latents (B, C, h, w); decoded once, and only where a judge sees pictures.

    decode: latents to uint8 pictures.
    """
    pictures, scores = None, []
    for judge in judges:
        if isinstance(judge, LatentReward):
            scores.append(judge.score_latents(latents, conditions).float())
            continue
        pictures = decode(latents) if pictures is None else pictures
        scores.append(judge.score(pictures, conditions).float())
    return torch.stack(scores)
