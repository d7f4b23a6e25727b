"""Videos for what knows pictures: which frames are seen, and rewards of pictures on them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill.tasks.video import FrameReward, judge_for, spread, stills


def film(frames: int, batch: int = 2) -> Tensor:
    """Every frame has its number as its colour, plus ten for each video."""
    numbers = (
        torch.arange(frames).float()[None, None, :, None, None] + 10 * torch.arange(batch)[:, None, None, None, None]
    )
    return numbers.expand(batch, 3, frames, 4, 6).clone()


class Brightness:
    name, range, requires_grad = "brightness", (0.0, 255.0), True
    seen: Sequence[Any] = ()

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
        assert images.ndim == 4 and len(images) == len(conditions)
        self.seen = conditions
        return images.float().mean((1, 2, 3))

    score_pixels = score


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert spread(film(9), 3)[:, :, 0, 0, 0].tolist() == [[0, 4, 8], [10, 14, 18]]
    assert spread(film(1), 3)[0, :, 0, 0, 0].tolist() == [0, 0, 0]


def test_stills_stand_side_by_side() -> None:
    row = stills(film(9))
    assert row.shape == (2, 3, 4, 18)
    assert row[0, 0, 0].tolist() == [0.0] * 6 + [4.0] * 6 + [8.0] * 6
    pictures = torch.rand(2, 3, 4, 6)
    assert stills(pictures) is pictures


def test_a_picture_reward_judges_videos_by_their_frames() -> None:
    judge = Brightness()
    reward = FrameReward(judge, 4)
    assert reward.score(film(4), ["a", "b"]).tolist() == [1.5, 11.5]
    assert judge.seen == ["a"] * 4 + ["b"] * 4
    assert (reward.name, reward.range, reward.requires_grad) == ("brightness", (0.0, 255.0), True)
    video = film(9).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score_pixels(video, ["a", "b"]).sum(), video)
    assert gradient.abs().sum((0, 1, 3, 4)).bool().tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
    ]


def test_only_families_of_videos_have_frames() -> None:
    judge = Brightness()
    picture, video = (SimpleNamespace(latent_shape=lambda s=s: s) for s in ((4, 8, 8), (4, 2, 8, 8)))
    assert judge_for(picture, judge) is judge
    assert isinstance(judge_for(video, judge), FrameReward)
    judge.video = True  # type: ignore[attr-defined]
    assert judge_for(video, judge) is judge
