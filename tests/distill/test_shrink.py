"""Rehearsals: every production recipe does two iterations with tiny networks, from files to the student's folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from distill.bundle import Bundle
from distill.config import RecipeError, load_recipe
from distill.data import cache
from distill.families.load import load_teacher
from distill.roles import ADAPTER
from distill.run import main
from distill.shrink import shrunk

RECIPES = Path(__file__).parents[2] / "recipes"
PRODUCTION = sorted(p.stem for p in RECIPES.glob("*.yaml") if not p.stem.startswith(("scenes-", "digits-")))
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


@pytest.mark.parametrize("name", PRODUCTION)
def test_every_production_recipe_does_two_iterations_when_shrunk(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, lines = load_recipe(RECIPES / f"{name}.yaml"), rehearse(name, tmp_path, [])
    alone = recipe.advantage is not None and not recipe.heldout_rewards
    assert ("trains and nothing is held out" in caplog.text) == alone
    if recipe.advantage:
        assert all(abs(line["advantage"]) < 1 and line["reward_not_finite"] == 0 for line in lines)
        assert 0 < min(line["w_ess"] for line in lines) <= 1
    if recipe.advantage and recipe.advantage.reward == "videoalign":
        total = sum(lines[0][f"videoalign/{axis}"] for axis in ("VQ", "MQ", "TA"))
        assert total == pytest.approx(lines[0]["reward"], abs=1e-3)
    if recipe.gan:
        assert all(line["discriminator/loss"] > 0 for line in lines)

    manifest = Bundle.open(tmp_path / "out-shrunk").manifest
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


def test_what_cannot_be_shrunk_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "digits-reward.yaml"), "--shrink"]) == 2
    assert "--shrink rehearses distillations, not reward" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="'models/digits-teacher' has no production family to shrink"):
        shrunk(load_recipe(RECIPES / "digits-amd.yaml"), tmp_path)
    assert list(tmp_path.iterdir()) == []
