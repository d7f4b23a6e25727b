"""The video autoencoder's training: what its samples are, and that its quick norms are diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.config import VideoVaeRecipe, parse_recipe
from distill.data import cache
from distill.tasks.video_vae import FIRST_DEVIATION, VideoVaeTask, new_video_vae, with_fused_norms

TREE = {
    "task": "video-vae",
    "name": "tiny",
    "output": "tiny",
    "iterations": 4,
    "batch_size": 2,
    "data": {"count": 8, "size": 32, "frames": 9},
    "window": 5,
    "single_frames": 2,
    "crop": 16,
    "model": {"base_dim": 8, "latent_channels": 4},
    "optimizer": {"learning_rate": 1e-3},
}


def recipe(**changes: object) -> VideoVaeRecipe:
    parsed: VideoVaeRecipe = parse_recipe({**TREE, **changes})
    return parsed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE", tmp_path)


def test_fused_norms_are_the_same_function_with_the_same_gradient() -> None:
    torch.manual_seed(0)
    plain = new_video_vae(recipe())
    quick = with_fused_norms(new_video_vae(recipe()))
    quick.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 5, 32, 32)
    outputs = [vae.decode(vae.encode(x).latent_dist.mode()).sample for vae in (plain, quick)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for y in outputs:
        y.square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), quick.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_posterior_starts_narrow() -> None:
    posterior = new_video_vae(recipe()).encode(torch.randn(1, 3, 5, 32, 32)).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, FIRST_DEVIATION))


@pytest.mark.usefixtures("folder")
def test_samples_are_single_frames_first_and_then_parts_or_whole_frames_of_windows() -> None:
    task = VideoVaeTask(recipe(p_whole=0.0))
    assert task._draw(0, 0).shape == (10, 3, 1, 16, 16)
    assert task._draw(2, 0).shape == (2, 3, 5, 16, 16)
    assert VideoVaeTask(recipe(p_whole=1.0))._draw(2, 0).shape == (2, 3, 5, 32, 32)
    assert VideoVaeTask(recipe(crop=None, single_frames=0))._draw(0, 0).shape == (2, 3, 5, 32, 32)
    assert torch.equal(task._draw(3, 0), task._draw(3, 0)) and not torch.equal(task._draw(3, 0), task._draw(2, 0))


@pytest.mark.usefixtures("folder")
def test_a_single_frame_has_no_changes_to_get_right() -> None:
    loss, values = VideoVaeTask(recipe())._loss(0, 0)
    assert torch.isfinite(loss) and torch.isfinite(torch.as_tensor(values["l1"]))


def test_a_part_is_no_larger_than_the_frames() -> None:
    with pytest.raises(ValueError, match="crop is 64 and frames are 32 pixels high"):
        recipe(crop=64)
