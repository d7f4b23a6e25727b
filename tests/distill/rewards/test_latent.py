"""A reward of latents: a folder round trip, the reward's own words, batches, gradients, teachers that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import RecipeError
from distill.families.sdxl import Sdxl
from distill.families.wan import Wan
from distill.rewards import ClipReward, image_features, load_reward, text_features
from distill.rewards.latent import LatentReward, latent_clip, scores_of
from distill.shrink import save_tiny_clip
from distill.tasks.video import judge_for

SHAPE = (4, 16, 16)
CAPTIONS = ["a red cube", "a small blue sphere", "a red cube"]


@pytest.fixture(scope="module")
def imitated(tmp_path_factory: pytest.TempPathFactory) -> ClipReward:
    """A reward of 32 × 32 pixels in 4 × 4 patches."""
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder, 0)
    reward: ClipReward = load_reward(f"clip:{folder}")
    return reward


def made(imitated: ClipReward, shape: tuple[int, int, int] = SHAPE, scale: float = 0.5) -> LatentReward:
    torch.manual_seed(0)
    clip = latent_clip(imitated.clip, shape, 8)
    return LatentReward(
        clip, imitated.tokenizer, "latent", factor=imitated.factor, scale=scale, imitates=imitated.digest
    )


@pytest.fixture(scope="module")
def folder(imitated: ClipReward, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latent-reward")
    made(imitated).save(root, {"within": 0.5})
    return root


def latents(count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_a_folder_is_a_reward_by_its_name(folder: Path, imitated: ClipReward) -> None:
    reward = load_reward(folder)
    assert isinstance(reward, LatentReward) and reward.name == folder.name and len(reward.digest) == 64
    assert (reward.shape, reward.scale, reward.range) == (SHAPE, 0.5, (-100.0, 100.0))
    assert reward.imitates == imitated.digest != reward.digest
    scores = reward.score_latents(latents(), CAPTIONS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and bool((scores.abs() <= 100).all())
    assert torch.equal(scores, load_reward(folder).score_latents(latents(), CAPTIONS))
    torch.testing.assert_close(scores, made(imitated).score_latents(latents(), CAPTIONS), rtol=0, atol=0.2)  # float16


def test_one_by_one_they_score_as_together(folder: Path) -> None:
    reward = load_reward(folder)
    alone = torch.cat([reward.score_latents(latents()[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward.score_latents(latents(), CAPTIONS), alone, rtol=1e-4, atol=1e-4)


def test_words_and_the_tower_behind_the_stem_are_the_rewards_own(imitated: ClipReward) -> None:
    reward = made(imitated)
    words = text_features(imitated.clip, imitated.tokenizer, CAPTIONS)
    expected = 100 * (image_features(reward.clip, latents()) * words).sum(-1)
    torch.testing.assert_close(reward.score_latents(latents(), CAPTIONS), expected)
    theirs, ours = imitated.clip.state_dict(), reward.clip.state_dict()
    assert {name for name in theirs if name not in ours} == {"vision_model.embeddings.patch_embedding.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)
    stem = reward.clip.vision_model.embeddings.patch_embedding
    assert stem(latents()).shape == (3, 16, 4, 4)  # the grid of 32 pixels in patches of 8


def test_its_gradient_reaches_every_latent(folder: Path) -> None:
    x = latents().requires_grad_()
    load_reward(folder).score_latents(x, CAPTIONS).sum().backward()
    assert x.grad is not None and bool((x.grad.abs().amax(1) > 0).all())


def test_pictures_and_wrong_counts_are_refused(folder: Path) -> None:
    reward = load_reward(folder)
    with pytest.raises(ValueError, match=r"scores latents, not pictures; give the reward of pictures that it imitates"):
        reward.score(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), CAPTIONS)
    with pytest.raises(ValueError, match="3 pictures and 2 prompts"):
        reward.score_latents(latents(), CAPTIONS[:2])


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 2, 2), (4, 8, 16)])
def test_latents_that_do_not_divide_into_the_towers_grid_are_refused(
    imitated: ClipReward, shape: tuple[int, int, int]
) -> None:
    with pytest.raises(RecipeError, match=rf"latents of {shape[1]} × {shape[2]} do not divide into the reward's 4 × 4"):
        latent_clip(imitated.clip, shape, 8)


def test_a_teacher_of_other_latents_is_refused(
    imitated: ClipReward, tiny_sources: Path, tiny_video_sources: Path
) -> None:
    """By channels, size, scale, or because they are of videos."""
    family, _ = Sdxl.from_folder(tiny_sources)
    fitting = made(imitated)
    assert judge_for(family, fitting) is fitting
    for other in (made(imitated, (16, 16, 16)), made(imitated, (4, 8, 8)), made(imitated, scale=0.18215)):
        with pytest.raises(
            RecipeError, match=r"those of the teacher \(sdxl\) are \(4, 16, 16\) at 0.5; train a latent"
        ):
            judge_for(family, other)
    video, _ = Wan.from_folder(tiny_video_sources, size=(32, 32), frames=5)
    with pytest.raises(RecipeError, match=r"those of the teacher \(wan\) are \(4, 3, 16, 16\) at None"):
        judge_for(video, fitting)


def test_latents_are_decoded_once_and_only_for_who_sees_pictures(imitated: ClipReward) -> None:
    reward, shown = made(imitated), []

    def decode(x: Tensor) -> Tensor:
        shown.append(len(x))
        return torch.zeros(len(x), 3, 32, 32, dtype=torch.uint8)

    judges: list[Any] = [reward, reward]
    assert scores_of(judges, latents(), CAPTIONS, decode).shape == (2, 3) and not shown
    scores = scores_of([imitated, reward, imitated], latents(), CAPTIONS, decode)
    assert shown == [3] and torch.equal(scores[0], scores[2]) and not scores.requires_grad
    torch.testing.assert_close(scores[1], reward.score_latents(latents(), CAPTIONS))
