"""Rehearsals: every recipe does two iterations with tiny networks, from what it reads to the folder of its result."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import DiffusionPipeline

from distill.bundle import Bundle
from distill.config import _CLASSES, DistillRecipe, load_recipe, parse_recipe
from distill.data import cache
from distill.families.load import load_teacher
from distill.roles import ADAPTER
from distill.run import main
from distill.shrink import _SMALL, SIDE, shrunk
from tests.distill.test_tasks import EMBEDDED, rehearsed

RECIPES = Path(__file__).parents[2] / "recipes"
EVERY = sorted(p.stem for p in RECIPES.glob("*.yaml"))
PRODUCTION = [name for name in EVERY if name not in EMBEDDED]
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "sit": "DiTPipeline",
    "wan": "WanPipeline",
}
ROW = re.compile(r"^\| `([\w.-]+)` \| (?:LoRAs|all weights)[^|]* \| `([^|]+)` \|$", re.MULTILINE)
OTHER_WAYS = [
    (name, shlex.split(overrides))
    for name, overrides in ROW.findall((RECIPES.parent / "docs/recipes.md").read_text(encoding="utf-8"))
]
"""Recipes of all weights as LoRAs and the reverse: the table of docs/recipes.md, §4."""
IN_STAGES = "sdxl-amd-1step"


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def rehearse(name: str, tmp_path: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """The log of two iterations of a recipe, shrunk, whose student diffusers loads from tmp_path/out-shrunk."""
    short = ["iterations=2", "log_every=1", "preview_every=2", f"output={tmp_path}/out"]
    assert main([str(RECIPES / f"{name}.yaml"), "--shrink", "--quiet", *overrides, *short]) == 0
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    run, out = tmp_path / f"runs/{recipe.name}-shrunk", tmp_path / "out-shrunk"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert lines[0]["student/loss"] >= 0 and all(line["fake/loss"] > 0 for line in lines)
    assert (run / "previews" / "0000002.png").is_file()
    assert (out / ADAPTER).is_file() == (recipe.adapters is not None and "student" in recipe.adapters.roles)
    pipeline = PIPELINES[Bundle.open(out).manifest.family]
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == pipeline
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == pipeline
    return lines


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in EMBEDDED else []) for name in EVERY]
)
def test_every_recipe_parses_dry_runs_and_does_two_iterations_when_shrunk(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    if name in EMBEDDED:
        folder = rehearsed(tmp_path_factory.getbasetemp())  # dry runs too; test_tasks.py says what they leave
    else:
        folder = tmp_path
        assert main([str(RECIPES / f"{name}.yaml"), "--shrink", "--dry-run", "iterations=2"]) == 0
        check_student(recipe, rehearse(name, tmp_path, []), tmp_path / "out-shrunk", caplog.text)
    text = (folder / f"runs/{name}-shrunk/log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    losses = [value for line in lines for key, value in line.items() if key.endswith("/loss")]
    assert len(losses) >= 2 and np.isfinite(losses).all()


def check_student(recipe: DistillRecipe, lines: list[dict[str, Any]], folder: Path, warnings: str) -> None:
    """A production recipe's own terms are in the log and its steps in the student's folder."""
    alone = recipe.advantage is not None and not recipe.heldout_rewards
    assert ("trains and nothing is held out" in warnings) == alone
    if recipe.advantage:
        assert all(abs(line["advantage"]) < 1 and line["reward_not_finite"] == 0 for line in lines)
        assert 0 < min(line["w_ess"] for line in lines) <= 1
    if recipe.advantage and recipe.advantage.reward == "videoalign":
        total = sum(lines[0][f"videoalign/{axis}"] for axis in ("VQ", "MQ", "TA"))
        assert total == pytest.approx(lines[0]["reward"], abs=1e-3)
    if recipe.gan:
        assert all(line["discriminator/loss"] > 0 for line in lines)

    manifest = Bundle.open(folder).manifest
    assert sorted(manifest.samplers) == list(recipe.steps)
    if recipe.timesteps:
        assert manifest.samplers[1].timesteps == recipe.timesteps


@pytest.mark.parametrize(("name", "overrides"), [way for way in OTHER_WAYS if way[0] != IN_STAGES])
def test_recipes_of_all_weights_rehearse_as_loras_and_the_reverse(
    name: str, overrides: list[str], tmp_path: Path
) -> None:
    rehearse(name, tmp_path, overrides)


def test_all_weights_of_one_step_are_rehearsed_in_two_stages(tmp_path: Path) -> None:
    first, second = (overrides for name, overrides in OTHER_WAYS if name == IN_STAGES)
    assert rehearse(IN_STAGES, tmp_path, first)[0]["regression"] > 0
    earlier = "initialise_from=runs/sdxl-amd-1step-ode"
    assert second[0] == earlier
    second[0] = f"initialise_from={tmp_path}/runs/sdxl-amd-1step-ode-shrunk"
    assert "regression" not in rehearse(IN_STAGES, tmp_path, second)[0]


def test_every_production_recipe_has_both_ways() -> None:
    ways: dict[str, set[bool]] = {name.removesuffix("-lora"): set() for name in PRODUCTION}
    for name, overrides in [*((name, []) for name in PRODUCTION), *OTHER_WAYS]:
        ways[name.removesuffix("-lora")].add(bool(load_recipe(RECIPES / f"{name}.yaml", overrides).adapters))
    assert [name for name, found in ways.items() if found != {True, False}] == []


def test_a_rehearsal_keeps_the_method_and_the_schedule(tmp_path: Path) -> None:
    whole = load_recipe(RECIPES / "wan-1.3b-amd-4step.yaml")
    small = shrunk(whole, tmp_path / "inputs")
    apart = {"name", "output", "teacher", "size", "frames", "data", "batch_size", "accumulate", "telemetry"}
    rewards = {"advantage": {"reward"}, "heldout_rewards": True}
    left = {**dict.fromkeys(apart, True), **rewards}
    assert small.model_dump(exclude=left) == whole.model_dump(exclude=left)  # type: ignore[arg-type]
    assert (small.batch_size, small.accumulate, small.frames) == (8, 2, 5)
    assert len({small.advantage.reward, *small.heldout_rewards}) == 3
    assert load_teacher(small).family.schedule.grid(4).tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625])


def test_files_of_a_rehearsal_are_written_once(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "sit-xl-amd-1step.yaml")
    first = shrunk(recipe, tmp_path / "inputs")
    stamps = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "inputs").rglob("*")) if path.is_file()}
    assert shrunk(recipe, tmp_path / "inputs") == first
    again = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "inputs").rglob("*")) if path.is_file()}
    assert again == stamps and len(stamps) > 5
    assert sorted(path.name for path in (tmp_path / "inputs").iterdir()) == ["reward-0", "teacher"]


def test_ranks_of_torchrun_each_get_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    small = shrunk(load_recipe(RECIPES / "sdxl-dmd2-4step.yaml"), tmp_path)
    assert (small.accumulate, small.batch_size) == (8, 8)


def own_recipes(folder: Path) -> Path:
    """Recipes of somebody's own: a teacher and a reward of digits, and their student."""
    folder.mkdir()
    for name in ("teacher", "reward", "amd"):
        text = (RECIPES / f"digits-{name}.yaml").read_text()
        text = text.replace("models/", "own/").replace("bundles/", "own/").replace("digits-", "own-")
        (folder / f"{name}.yaml").write_text(text)
    (folder / "notes.yaml").write_text("no: [recipe")
    return folder


def test_what_own_recipes_read_is_made_by_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    amd = str(own_recipes(tmp_path / "experiments") / "amd.yaml")
    monkeypatch.chdir(tmp_path)
    assert main([amd, "--shrink", "iterations=2", "--dry-run", "foundation_gan={features: own/own-reward}"]) == 0
    tree = parse_recipe(yaml.safe_load(capsys.readouterr().out))
    made = tmp_path / "runs/own-amd-shrunk/inputs/recipes"
    assert tree.teacher == str(made / "own-teacher/result")
    assert tree.advantage.reward == tree.foundation_gan.features == str(made / "own-reward/result")
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert main([amd, "--shrink", "iterations=2", "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == stamps

    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiments", "own", "runs"]
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["own-sit-shrunk"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["own-amd-shrunk"]
    assert sorted(path.name for path in made.iterdir()) == ["own-reward", "own-teacher"]
    source = Bundle.open(tmp_path / "own/own-sit-shrunk").manifest.provenance["teacher"]
    assert source["digest"] == Bundle.open(made / "own-teacher/result").digest


def test_a_recipe_elsewhere_finds_what_it_reads_in_ours(tmp_path: Path) -> None:
    text = (RECIPES / "scenes-video-reward.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("scenes-video-reward", "own"))
    small = shrunk(load_recipe(tmp_path / "own.yaml"), tmp_path / "inputs", tmp_path, write=False)
    assert small.text_encoder == str(tmp_path / "inputs/recipes/scenes-umt5/result")


def test_a_stage_starts_from_the_run_of_the_one_before(tmp_path: Path) -> None:
    small = shrunk(load_recipe(RECIPES / "scenes-wan-teacher.yaml"), tmp_path, write=False)
    made = tmp_path / "recipes"
    assert small.initialise_from == str(made / "scenes-wan-stills/run")
    assert small.model.vae == str(made / "scenes-video-vae/result")  # the first stage's: the second reads it too
    clip = load_recipe(RECIPES / "scenes-teacher.yaml", ["model.text_encoder=bundles/scenes-sdxl/text_encoder"])
    parts = shrunk(clip, tmp_path, write=False).model
    assert parts.text_encoder == str(made / "scenes-amd/result/text_encoder")
    assert parts.text_encoder_2 == str(made / "scenes-clip/result/text_encoder_2")


def test_a_dry_run_of_what_is_no_distillation_writes_nothing(tmp_path: Path) -> None:
    assert main([str(RECIPES / "scenes-wan-teacher.yaml"), "--shrink", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_every_task_has_a_small_form() -> None:
    assert _CLASSES.keys() <= _SMALL.keys()


def test_what_is_off_stays_off_and_levels_stay(tmp_path: Path) -> None:
    def small(name: str, *overrides: str) -> Any:
        return shrunk(load_recipe(RECIPES / f"{name}.yaml", list(overrides)), tmp_path, write=False)

    video = small("scenes-video-vae")
    assert (video.single_frames, video.crop, video.window) == (1, SIDE // 2, 5)
    video = small("scenes-video-vae", "single_frames=0", "crop=null")
    assert (video.single_frames, video.crop, video.model.dim_mult) == (0, None, (1, 2, 4))
    vae = small("scenes-vae", "model.block_out_channels=[64, 128, 256, 512]", "iterations=7", "batch_size=6")
    assert (vae.model.block_out_channels, vae.iterations, vae.batch_size) == ((8,) * 4, 7, 6)
    assert small("scenes-wan-stills").data.frames == 1 and small("scenes-wan-teacher").data.frames == 9


def test_what_the_command_line_names_stays(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["iterations=2", "compile=true", "model.transformer.layers=3", "sampling_steps=7"]
    assert main([str(RECIPES / "scenes-wan-stills.yaml"), "--shrink", "--dry-run", *named]) == 0
    recipe = parse_recipe(yaml.safe_load(capsys.readouterr().out))
    assert (recipe.iterations, recipe.compile, recipe.sampling_steps) == (2, True, 7)
    assert (recipe.model.transformer.layers, recipe.model.transformer.width) == (3, 48)


def test_ranks_of_torchrun_make_what_they_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of which no second one answers
    small = shrunk(load_recipe(RECIPES / "digits-dmd2.yaml", ["accumulate=4"]), tmp_path)
    assert (small.accumulate, os.environ["WORLD_SIZE"]) == (2, "2")
    assert Bundle.open(small.teacher).manifest.name == "digits-teacher-shrunk"


def circle(folder: Path) -> Path:
    """Two rewards that start from each other."""
    text = (RECIPES / "scenes-reward.yaml").read_text()
    for one, other in (("a", "b"), ("b", "a")):
        recipe = text.replace("models/scenes-clip", other).replace("models/scenes-reward", one)
        (folder / f"{one}.yaml").write_text(recipe.replace("scenes-reward", one))
    return folder / "a.yaml"


def test_what_cannot_be_shrunk_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(recipe: Path, *overrides: str) -> str:
        assert main([str(recipe), "--shrink", *overrides]) == 2
        return capsys.readouterr().err

    amd = RECIPES / "digits-amd.yaml"
    found = refused(amd, "teacher=nowhere")
    assert "teacher: no recipe here makes 'nowhere', and it has no production family to shrink" in found
    assert "put the recipe that makes it beside this one, or name its family" in found
    assert "clip: no recipe here makes 'nowhere'" in refused(RECIPES / "scenes-reward.yaml", "clip=nowhere")
    assert "model.vae: no recipe here makes 'x/y'" in refused(RECIPES / "scenes-teacher.yaml", "model.vae=x/y")
    assert "advantage.reward: 'hpsv3' is no reward's name and no folder" in refused(amd, "advantage.reward=hpsv3")
    assert "advantage.reward: no recipe here makes 'x/y'" in refused(amd, "advantage.reward=x/y")

    a = circle(tmp_path)
    message = f"{tmp_path}/b.yaml: b reads what is made by a reads what is made by b"
    assert message in refused(a)
    assert list((tmp_path / "runs/a-shrunk/inputs/recipes").iterdir()) == []
    (tmp_path / "c.yaml").write_text((tmp_path / "b.yaml").read_text())
    assert "clip: 'b' is made by b.yaml and c.yaml; give each a name and an output of its own" in refused(a)
