"""Every recipe of the embedded models, rehearsed with ``--shrink``; then export, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
from distill.data import cache as pictures
from distill.export.__main__ import main as export
from distill.families.load import clip_of
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.families.wan import Wan
from distill.labeller import Labeller
from distill.rewards import ClipReward, DigitClassifier, load_reward
from distill.run import main
from distill.sampling import student_table
from distill.shrink import SIDE
from distill.tasks.diffusion import sample
from service.runtimes import generate, open_runtime

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"
EMBEDDED = sorted(p.stem for p in RECIPES.glob("*.yaml") if p.stem.startswith(("scenes-", "digits-")))
READ = {
    "scenes-vae", "scenes-clip", "scenes-reward", "scenes-teacher", "scenes-video-vae", "scenes-umt5",
    "scenes-video-reward", "scenes-wan-stills", "scenes-wan-teacher", "digits-reward", "digits-teacher",
}  # fmt: skip
"""What others start from."""


@cache
def rehearsed(base: Path) -> Path:
    """A folder with results as models/<recipe>-shrunk, runs as runs/<recipe>-shrunk, and the inputs that they share.

    base: pytest's own, the same for all test files, so that each recipe is rehearsed once.
    """
    root = base / "rehearsed"
    (root / "inputs").mkdir(parents=True)
    with in_folder(root):
        for name in EMBEDDED:
            run = root / f"runs/{name}-shrunk"
            run.mkdir(parents=True)
            (run / "inputs").symlink_to(root / "inputs")
            arguments = [str(RECIPES / f"{name}.yaml"), "--shrink", "iterations=2", f"output={root}/models/{name}"]
            assert main([*arguments, "--dry-run"]) == 0, name
            assert main([*arguments, "--quiet", "log_every=1"]) == 0, name
    return root


@contextmanager
def in_folder(root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_RUNS", str(root / "runs"))
        patch.setattr(pictures, "CACHE", root / "cache")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = rehearsed(tmp_path_factory.getbasetemp())
    with in_folder(root):
        yield root


def lines(made: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / f"runs/{name}-shrunk/log.jsonl").read_text().splitlines()]


def test_what_others_start_from_is_made_once(made: Path) -> None:
    assert {path.name for path in (made / "inputs").iterdir()} == {"recipes"}
    assert {path.name for path in (made / "inputs/recipes").iterdir()} == READ


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_recipe_trains_and_leaves_what_it_should(made: Path, name: str) -> None:
    log = lines(made, name)
    assert [line["iteration"] for line in log] == [1, 2]
    losses = [value for line in log for key, value in line.items() if key.endswith("/loss")]
    assert len(losses) >= 2 and np.isfinite(losses).all()
    run = made / f"runs/{name}-shrunk"
    assert np.asarray(Image.open(run / "previews/0000002.png")).std() > 0
    assert (run / "checkpoints/step-0000002/state.safetensors").is_file()
    assert load_recipe(run / "recipe.yaml").name == f"{name}-shrunk"
    assert any((made / f"models/{name}-shrunk").rglob("*.safetensors"))


def test_the_autoencoder_keeps_the_scale_of_its_latents(made: Path) -> None:
    vae = AutoencoderKL.from_pretrained(made / "models/scenes-vae-shrunk", torch_dtype=torch.float32)
    images = torch.from_numpy(np.array(pictures.scene_images(9_001, 256, SIDE))).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=0.02)


def test_the_second_text_encoder_is_the_text_tower_of_the_clip(made: Path) -> None:
    folder = made / "models/scenes-clip-shrunk"
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["a small red cube"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 40)
    with torch.no_grad():
        expected = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        torch.testing.assert_close(encoder(input_ids=ids).text_embeds, expected, rtol=1e-3, atol=1e-4)


def test_rewards_and_the_labeller_load_where_evaluation_looks(made: Path) -> None:
    models = made / "models"
    assert isinstance(load_reward(models / "scenes-reward-shrunk"), ClipReward)
    digits = load_reward(models / "digits-reward-shrunk")
    assert isinstance(digits, DigitClassifier)
    assert 0 <= json.loads((models / "digits-reward-shrunk/config.json").read_text())["accuracy"] <= 1
    assert Labeller.load(models / "scenes-labeller-shrunk").width == 8
    accuracy = json.loads((models / "scenes-labeller-shrunk/config.json").read_text())["accuracy"]
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
    teacher = Bundle.open(made / f"inputs/recipes/{world}-teacher/result")
    trained = Bundle.open(made / f"models/{world}-teacher-shrunk")
    assert set(teacher.manifest.samplers) == set(trained.manifest.samplers) == {1, 2, 4, 8}
    for method in ("amd", "dmd2"):
        manifest = Bundle.open(made / f"models/{world}-{method}-shrunk").manifest
        assert (set(manifest.samplers), manifest.default_steps) == ({1, 2, 4}, 4)
        assert manifest.guidance.scale == 1.0 and teacher.manifest.guidance.scale > 1.0
        assert manifest.provenance["recipe"]["name"] == f"{world}-{method}-shrunk"
        assert manifest.provenance["teacher"]["digest"] == teacher.digest
        assert manifest.sizes == (((SIDE, SIDE),) if world == "scenes" else ((8, 8),))


@pytest.mark.parametrize("world", ["scenes", "digits", "scenes-wan"])
def test_a_student_is_exported_and_served(made: Path, world: str) -> None:
    """From noise to pixels through ONNX as the service does it: the picture that torch computes."""
    folder = made / f"models/{world}-amd-shrunk"
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
