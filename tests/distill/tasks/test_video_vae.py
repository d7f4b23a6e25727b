"""The video autoencoder's training: what its samples are, and that its quick norms are diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

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


@pytest.mark.usefixtures("folder")
def test_a_decoder_is_trained_alone_and_latents_stay(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    VideoVaeTask(recipe()).finish(source)
    task = VideoVaeTask(recipe(decoder_of=str(source), optimizer={"learning_rate": 0.1}))
    moving = [p for p in task.vae.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, 0.1)
    task._loss(2, 0)[0].backward()
    optimizer.step()
    task.finish(output)
    before, after = (AutoencoderKLWan.from_pretrained(path) for path in (source, output))
    assert before.config.latents_mean == after.config.latents_mean
    x = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(before.encode(x).latent_dist.mode(), after.encode(x).latent_dist.mode())
    z = torch.randn(1, 4, 2, 8, 8)
    assert not torch.equal(before.decode(z).sample, after.decode(z).sample)


def test_a_part_is_no_larger_than_the_frames() -> None:
    with pytest.raises(ValueError, match="crop is 64 and frames are 32 pixels high"):
        recipe(crop=64)
