"""Videos where the rest knows pictures: stills for previews, and rewards of pictures on frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.parallel.device import moved
from distill.rewards.latent import LatentReward

FRAMES = 4
"""Frames of a video that a reward of pictures sees."""


def spread(videos: Tensor, count: int) -> Tensor:
    """``count`` frames of (B, 3, F, H, W), the first, the last and evenly between: (B, count, 3, H, W)."""
    index = moved(torch.linspace(0, videos.shape[2] - 1, count).round().long(), videos.device)
    return videos[:, :, index].transpose(1, 2)


def stills(images: Tensor, count: int = 3) -> Tensor:
    """Videos (B, 3, F, H, W) as pictures (B, 3, H, count·W) of frames side by side; pictures as they are."""
    if images.ndim == 4:
        return images
    return spread(images, count).permute(0, 2, 3, 1, 4).flatten(3)


class FrameReward:
    """The mean of a picture reward over frames of a video. It sees what is shown, not how it moves."""

    def __init__(self, judge: Any, frames: int = FRAMES) -> None:
        self.judge, self.frames = judge, frames
        self.name, self.range, self.requires_grad = judge.name, judge.range, judge.requires_grad

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
        """Videos (B, 3, F, H, W) uint8 to (B,)."""
        return self._mean(self.judge.score, images, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
        """The same of float videos in [−1, 1], with a graph."""
        return self._mean(self.judge.score_pixels, pixels, conditions)

    def _mean(self, score: Any, videos: Tensor, conditions: Sequence[Any]) -> Tensor:
        frames = spread(videos, self.frames)
        each = [condition for condition in conditions for _ in range(self.frames)]
        scores: Tensor = score(frames.flatten(0, 1), each)
        return scores.reshape(len(videos), self.frames).mean(1)


def judge_for(family: Any, judge: Any) -> Any:
    """A reward as it can judge what a family makes. Raises RecipeError for a reward of other latents."""
    if isinstance(judge, LatentReward):
        judge.check(family)
        return judge
    return FrameReward(judge) if len(family.latent_shape()) == 4 and not getattr(judge, "video", False) else judge
