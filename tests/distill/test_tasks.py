"""Every recipe of ours, cut down to two iterations, in the order of ``make models``; then export, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.bundle import Bundle
from distill.config import load_recipe
from distill.data import cache
from distill.export.__main__ import main as export
from distill.families.load import clip_of
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.families.wan import Wan
from distill.labeller import Labeller
from distill.rewards import ClipReward, DigitClassifier, load_reward
from distill.run import main
from distill.sampling import student_table
from distill.tasks.diffusion import sample
from service.runtimes import generate, open_runtime

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["iterations=2", "batch_size=8", "log_every=1", "save_every=2", "preview_every=2"]
SCENES = ["data.count=64", "data.size=16"]
CLIPS = ["data.count=8", "data.size=32", "data.frames=9"]
STUDENT = ["fake_warmup=0", "fake_per_student=2"]
WAN = [
    "model.vae=MODELS/scenes-video-vae", "model.text_encoder=MODELS/scenes-umt5", "sampling_steps=2", "compile=false",
    "model.transformer={width: 48, layers: 2, heads: 2, feed_forward: 32}",
]  # fmt: skip
CUTS: dict[str, list[str]] = {
    "scenes-vae": ["model.block_out_channels=[8, 8, 8]", *SCENES],
    "scenes-clip": [
        "vision={width: 16, layers: 1, heads: 2}", "text={width: 16, layers: 2, heads: 2}",
        "text_small={width: 8, layers: 2, heads: 2}", "projection=16", *SCENES,
    ],
    "scenes-reward": ["clip=MODELS/scenes-clip", *SCENES],
    "scenes-labeller": ["width=8", *SCENES],
    "scenes-teacher": [
        "model.vae=MODELS/scenes-vae", "model.text_encoder=MODELS/scenes-clip/text_encoder",
        "model.text_encoder_2=MODELS/scenes-clip/text_encoder_2", "sampling_steps=2",
        "model.unet={block_out_channels: [16, 32], head_dim: 8, norm_num_groups: 8}", *SCENES,
    ],
    "scenes-video-vae": ["model={base_dim: 8, latent_channels: 4}", "window=5", *CLIPS],
    "scenes-video-decoder": ["decoder_of=MODELS/scenes-video-vae", "window=5", *CLIPS],
    "scenes-motion": ["width=8", *CLIPS],
    "scenes-umt5": ["tower={width: 16, layers: 1, heads: 2}"],
    "scenes-video-reward": ["text_encoder=MODELS/scenes-umt5", "width=8", "layers=1", "projection=8", *CLIPS],
    "scenes-wan-stills": [*WAN, *CLIPS, "data.frames=1"],
    "scenes-wan-teacher": [*WAN, *CLIPS, "initialise_from=MODELS/../runs/scenes-wan-stills"],
    "scenes-wan-dmd2": ["teacher=MODELS/scenes-wan-teacher", "compile=false", *STUDENT, *CLIPS],
    "scenes-wan-amd": [
        "teacher=MODELS/scenes-wan-teacher", "advantage.reward=MODELS/scenes-video-reward", "compile=false",
        *STUDENT, *CLIPS,
    ],
    "scenes-dmd2": ["teacher=MODELS/scenes-teacher", *STUDENT, *SCENES],
    "scenes-amd": ["teacher=MODELS/scenes-teacher", "advantage.reward=MODELS/scenes-reward", *STUDENT, *SCENES],
    "digits-reward": [],
    "digits-teacher": ["model={family: sit, width: 16, layers: 1, heads: 2}", "sampling_steps=2"],
    "digits-dmd2": ["teacher=MODELS/digits-teacher", *STUDENT],
    "digits-amd": ["teacher=MODELS/digits-teacher", "advantage.reward=MODELS/digits-reward", *STUDENT],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the results as MODELS/<recipe> and the runs as runs/<recipe>."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_RUNS", str(root / "runs"))
        patch.setattr(cache, "CACHE", root / "cache")
        for name, cuts in CUTS.items():
            overrides = [f"output=MODELS/{name}", *SHORT, *cuts]
            arguments = [text.replace("MODELS", str(root / "MODELS")) for text in overrides]
            recipe = str(RECIPES / f"{name}.yaml")
            assert main([recipe, "--dry-run", *arguments]) == 0, name
            assert main([recipe, "--quiet", *arguments]) == 0, name
        yield root


def lines(made: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / "runs" / name / "log.jsonl").read_text().splitlines()]


def test_no_recipe_is_left_out() -> None:
    """Production recipes, all others, are rehearsed in test_shrink.py."""
    assert CUTS.keys() == {path.stem for path in RECIPES.glob("*.yaml") if path.stem.startswith(("scenes-", "digits-"))}


@pytest.mark.parametrize("name", CUTS)
def test_a_recipe_trains_and_leaves_what_it_should(made: Path, name: str) -> None:
    log = lines(made, name)
    assert [line["iteration"] for line in log] == [1, 2]
    losses = [value for line in log for key, value in line.items() if key.endswith("/loss")]
    assert len(losses) >= 2 and np.isfinite(losses).all()
    assert np.asarray(Image.open(made / f"runs/{name}/previews/0000002.png")).std() > 0
    assert (made / f"runs/{name}/checkpoints/step-0000002/state.safetensors").is_file()
    assert load_recipe(made / f"runs/{name}/recipe.yaml").name == name
    assert any((made / "MODELS" / name).rglob("*.safetensors"))


def test_the_autoencoder_keeps_the_scale_of_its_latents(made: Path) -> None:
    vae = AutoencoderKL.from_pretrained(made / "MODELS/scenes-vae", torch_dtype=torch.float32)
    images = torch.from_numpy(np.array(cache.scene_images(9_001, 256, 16))).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=0.02)


def test_the_second_text_encoder_is_the_text_tower_of_the_clip(made: Path) -> None:
    folder = made / "MODELS/scenes-clip"
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["a small red cube"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 40)
    with torch.no_grad():
        expected = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        torch.testing.assert_close(encoder(input_ids=ids).text_embeds, expected, rtol=1e-3, atol=1e-4)


def test_rewards_and_the_labeller_load_where_evaluation_looks(made: Path) -> None:
    assert isinstance(load_reward(made / "MODELS/scenes-reward"), ClipReward)
    digits = load_reward(made / "MODELS/digits-reward")
    assert isinstance(digits, DigitClassifier)
    assert 0 <= json.loads((made / "MODELS/digits-reward/config.json").read_text())["accuracy"] <= 1
    assert Labeller.load(made / "MODELS/scenes-labeller").width == 8
    accuracy = json.loads((made / "MODELS/scenes-labeller/config.json").read_text())["accuracy"]
    assert accuracy.keys() == {"trained", "held_out"}


@pytest.mark.parametrize("world", ["scenes", "digits"])
def test_amd_reads_its_reward_and_dmd2_has_none(made: Path, world: str) -> None:
    first, second = lines(made, f"{world}-amd")
    assert {"reward", "reward_group_std", "advantage_clipped", "w_ess", "student/loss", "dm_norm"} <= first.keys()
    assert "student/loss" not in second and "fake/loss" in second
    assert first["alpha"] + first["beta"] == pytest.approx(2.0)
    assert not any("reward" in key for line in lines(made, f"{world}-dmd2") for key in line)


@pytest.mark.parametrize("world", ["scenes", "digits"])
def test_students_are_bundles_of_their_steps(made: Path, world: str) -> None:
    teacher = Bundle.open(made / f"MODELS/{world}-teacher")
    assert set(teacher.manifest.samplers) == {1, 2, 4, 8}
    for method in ("amd", "dmd2"):
        manifest = Bundle.open(made / f"MODELS/{world}-{method}").manifest
        assert (set(manifest.samplers), manifest.default_steps) == ({1, 2, 4}, 4)
        assert manifest.guidance.scale == 1.0 and teacher.manifest.guidance.scale > 1.0
        assert manifest.provenance["recipe"]["name"] == f"{world}-{method}"
        assert manifest.provenance["teacher"]["digest"] == teacher.digest
        assert manifest.sizes == ((16, 16),) if world == "scenes" else ((8, 8),)


@pytest.mark.parametrize("world", ["scenes", "digits", "scenes-wan"])
def test_a_student_is_exported_and_served(made: Path, world: str) -> None:
    """From noise to pixels through ONNX as the service does it: the picture that torch computes."""
    folder = made / f"MODELS/{world}-amd"
    assert export([str(folder), "--to", "onnx"]) == 0
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    runtime = open_runtime(bundle, threads=1, max_batch=1)
    prompts: Any = [3, 8] if world == "digits" else ["a small red cube", "a large blue metal sphere rolling left"]
    asked = {"labels": np.array(prompts)} if world == "digits" else prompts
    images = generate(runtime, manifest, asked, seeds=[5, 6], steps=4)
    side = manifest.sizes[0][0]
    assert images.shape == (2, *manifest.frames, side, side, 3) and images.dtype == np.uint8 and images.std() > 0

    loader: Any = {"scenes": Sdxl, "digits": Sit, "scenes-wan": Wan}[world]
    family, network = loader.from_folder(folder, **clip_of(bundle))
    schedule = family.schedule
    table = student_table(schedule, family.prediction, schedule.grid(4))
    with torch.no_grad():
        latents = sample(family, network.eval(), table, family.encode(prompts), [5, 6])
        expected = (family.decode(latents).movedim(1, -1) * 127.5 + 127.5).clamp(0, 255)
    assert np.abs(images - expected.numpy()).max() <= 2.0
