"""What makes a reward of latents, cut down; and AMD with one, which decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.config import RecipeError, load_recipe
from distill.data import cache
from distill.rewards import load_reward
from distill.rewards.latent import LatentReward, latent_clip
from distill.shrink import save_tiny_clip
from distill.tasks.common import to_float
from distill.tasks.distillation import DistillationTask
from distill.tasks.latent_reward import VERSIONS, LatentRewardTask
from distill.trainer import Trainer

RECIPES = Path(__file__).parents[3] / "recipes"
STEM, WHOLE = 30, 30
"""Iterations of both parts of a training."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an autoencoder and a reward of 32 × 32 pixels, both of random weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 30  # a random decoder paints grey on grey
    vae.save_pretrained(root / "vae")
    save_tiny_clip(root / "reward", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CACHE", root / "cache")
        yield root


def recipe_of(models: Path, folder: Path, *more: str) -> Any:
    settings = [
        f"vae={models}/vae", f"reward=clip:{models}/reward", f"output={folder}/out", f"iterations={STEM + WHOLE}",
        f"stem_iterations={STEM}", "batch_size=4", "width=8", "data={seed: 1, count: 12, size: 32}", "log_every=1",
        "preview_every=100", "save_every=100", "ema=0",
    ]  # fmt: skip
    return load_recipe(RECIPES / "scenes-latent-reward.yaml", [*settings, *more])


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert Trainer(LatentRewardTask(recipe_of(models, folder)), folder, quiet=True).run()
    return folder


def test_both_parts_of_a_training_learn_and_the_result_loads(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    first, second = lines[:STEM], lines[STEM:]
    assert all("stem_error" in line and "cosine" not in line for line in first)
    assert all("cosine" in line and "stem_error" not in line for line in second)
    for part in (first, second):
        losses = [line["reward/loss"] for line in part]
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    reward = load_reward(trained / "out")
    assert isinstance(reward, LatentReward) and (reward.shape, reward.scale) == ((4, 8, 8), 0.5)
    told = json.loads((trained / "out/config.json").read_text())["accuracy"]
    assert told.keys() == {"between", "within", "over_wrong", "over_wrong_imitated"}
    assert all(-1 <= value <= 1 for value in told.values())


def test_it_learns_from_what_the_autoencoder_makes_of_whole_and_damaged_scenes(models: Path, tmp_path: Path) -> None:
    task = LatentRewardTask(recipe_of(models, tmp_path))
    assert task.latents.shape == (12, VERSIONS, 4, 8, 8) and task.pictures.shape == (12, VERSIONS, 3, 32, 32)
    z, shown = (torch.from_numpy(np.array(array[3])) for array in (task.latents, task.pictures))
    with torch.no_grad():
        clean = to_float(cache.scene_images(1, 12, 32)[3:4])
        mode = task.vae.encode(clean).latent_dist.mode()
        pictures = task.vae.decode(z.float() / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(z[:1].float(), 0.5 * mode, rtol=1e-2, atol=1e-2)  # float16
    torch.testing.assert_close(to_float(shown), pictures, rtol=0, atol=0.01)  # of 256 levels
    assert all(float((z[0] - other).abs().max()) > 0.02 for other in z[1:])


def test_the_text_tower_and_the_reward_stay_as_they_are(models: Path, tmp_path: Path) -> None:
    task = LatentRewardTask(recipe_of(models, tmp_path, "stem_iterations=0"))
    loss, _ = task.phases(0)[0].loss(0)
    loss.backward()
    graded = {name.split(".")[0] for name, p in task.clip.named_parameters() if p.grad is not None}
    assert graded == {"vision_model", "visual_projection"}
    assert all(p.grad is None for module in (task.reward.clip, task.vae) for p in module.parameters())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("reward=models/digits-reward", "reward: models/digits-reward is a DigitClassifier, and a reward of latents"),
        ("vae=models/digits-reward", "vae: models/digits-reward holds no AutoencoderKL"),
        ("data.size=24", "latents of 6 × 6 do not divide into the reward's 4 × 4 patches"),
    ],
)
def test_what_cannot_be_imitated_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, message: str
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    with pytest.raises(RecipeError, match=message):
        LatentRewardTask(recipe_of(models, tmp_path, word))


# --- AMD with it -----------------------------------------------------------------------------------------------------

GRADIENTS = ["reward_gradient={weight: 0.01}", "reward_tilt={beta: 0.01}", "policy_gradient={weight: 0.5}"]


@pytest.fixture(scope="module")
def judge(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward of the tiny teacher's latents."""
    folder, imitated = tmp_path_factory.mktemp("judge"), load_reward(f"clip:{models}/reward")
    clip = latent_clip(imitated.clip, (4, 16, 16), 8)
    LatentReward(clip, imitated.tokenizer, "judge", factor=100.0, scale=0.5).save(folder, {})
    return folder


def amd(teacher: Path, judge: Path, folder: Path, *more: str) -> Trainer:
    settings = [
        f"teacher={teacher}", f"advantage.reward={judge}", "advantage.sigma_floor=0", "batch_size=8", "fake_warmup=0",
        "steps=[2]", "step_weights=null", f"output={folder}/out", "precision=float32", "advantage.precision=null",
        "sub_interval=null",
    ]  # fmt: skip
    recipe = load_recipe(RECIPES / "scenes-amd.yaml", [*settings, *more])
    return Trainer(DistillationTask(recipe), folder, quiet=True)


def refuse(latents: Tensor) -> Tensor:
    raise AssertionError("decoded")


@pytest.mark.parametrize("more", [[], GRADIENTS], ids=["scored", "differentiated"])
def test_nothing_is_decoded_in_training(
    tiny_sources: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    t = amd(tiny_sources, judge, tmp_path, *more)
    monkeypatch.setattr(t.task.family, "decode", refuse)
    monkeypatch.setattr(t.task, "decode", refuse)
    for _ in range(4):
        telemetry = t._step()
        t.iteration += 1
        (rollout,) = t.task._rollouts.values()
        expected = t.task.reward.score_latents(rollout.samples, rollout.prompts)
        torch.testing.assert_close(rollout.rewards(), expected, rtol=1e-4, atol=1e-4)
        assert float(rollout.advantage().abs().max()) > 0.5 and sum(telemetry["forwards/reward"]) == 8


def test_the_gradient_of_a_reward_of_latents_reaches_the_student(
    tiny_sources: Path, judge: Path, tmp_path: Path
) -> None:
    losses = []
    for weight in (0.0, 1.0):
        t = amd(tiny_sources, judge, tmp_path / str(weight), f"reward_gradient={{weight: {weight}}}")
        loss, _ = t.task.phases(0)[0].loss(0)
        loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in t.task.student.parameters() if p.grad is not None]))
    assert float((losses[1] - losses[0]).norm()) > 1e-3 * float(losses[0].norm())


def test_held_out_rewards_still_see_pictures(
    tiny_sources: Path, models: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, decoded = amd(tiny_sources, judge, tmp_path, f"heldout_rewards=[clip:{models}/reward]"), []
    decode = t.task.decode

    def counting(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        pictures: Tensor = decode(latents)
        return pictures

    monkeypatch.setattr(t.task, "decode", counting)
    t._step()
    (rollout,) = t.task._rollouts.values()
    assert decoded == [8] and bool(rollout.heldout["clip"].isfinite().all())


def test_a_decoder_that_nobody_looks_through_is_refused(tiny_sources: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"advantage\.decoder is some/decoder, and nothing is decoded"):
        amd(tiny_sources, judge, tmp_path, "advantage.decoder=some/decoder")


def test_a_teacher_of_other_latents_is_refused(tiny_sources: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"those of the teacher \(sdxl\) are \(4, 8, 8\) at 0.5"):
        amd(tiny_sources, judge, tmp_path, "size=[32, 32]")
