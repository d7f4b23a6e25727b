"""The model card says what the manifest and the run's log hold, and what they lack."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.bundle import Manifest
from distill.config import load_recipe
from distill.export.card import Cost, card, read_cost
from distill.provenance import provenance

RECIPE: dict[str, Any] = {
    "name": "tiny", "teacher": "owner/teacher", "seed": 7, "advantage": {"reward": "hpsv2.1", "group": 4},
    "adaptation": {"strength": 0.1}, "gan": {"weight": 1.0}, "heldout_rewards": ["pickscore", "hpsv2"], "betas": [0, 1],
}  # fmt: skip
SCORE = {"value": 31.25, "low": 30.5, "high": 32.0, "n": 400, "unit": "", "direction": "higher", "trained_on": 1}


def tiny(manifest: Manifest, **updates: Any) -> Manifest:
    provenance = {
        "recipe": RECIPE,
        "revision": "abc123",
        "dirty": True,
        "time": "2026-01-01",
        "packages": {"torch": "2"},
    }
    return manifest.model_copy(update={"provenance": provenance, **updates})


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def test_front_matter_is_what_the_hub_reads(manifest: Manifest) -> None:
    told = front(card(tiny(manifest), "usage", None))
    assert told["library_name"] == "diffusers" and told["pipeline_tag"] == "text-to-image"
    assert told["base_model"] == "owner/teacher" and "few-step" in told["tags"]


def test_card_holds_steps_recipe_scores_cost_and_origin(manifest: Manifest) -> None:
    scored = tiny(manifest, scores={"parti": {"4": {"hpsv2.1": SCORE}}})
    cost = Cost(2000, 7200.0, 3000.0, {"student": 64_000.0, "teacher": 0.0})
    text = card(scored, "pipe(1)", cost, {"rank": 8, "captured": 0.98765})
    assert "```python\npipe(1)\n```" in text
    assert "| 4 (default) | 999, 749, 499, 249 |" in text and "in 1, 2, 4 or 8 steps" in text
    assert "AMD's score adaptation and a GAN on the fake score" in text
    assert "| parti | 4 | hpsv2.1 (trained on) ↑ | 31.25 | 30.5 to 32 | 400 |" in text
    assert (
        "2,000 iterations in 2 hours on the clock, 50 minutes of processor time" in text and "student 64,000." in text
    )
    assert "- rank: 8\n- captured: 0.9877" in text
    assert "- code: abc123 with uncommitted changes" in text and "- packages: torch 2" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == RECIPE


def test_cost_names_the_machine_and_its_ranks(manifest: Manifest) -> None:
    cost = Cost(2000, 7200.0, 3000.0, {})
    plain = tiny(manifest)

    def told(machine: dict[str, Any], ranks: int, cost: Cost | None = cost) -> str:
        found = plain.provenance | {"machine": machine, "ranks": ranks}
        return card(plain.model_copy(update={"provenance": found}), "", cost).split("## Cost")[1].split("##")[0]

    gpus = {"gpus": {"NVIDIA H200": 4}, "cores": 64, "processor": "a CPU"}
    assert "in the first process, on 8 ranks, each node with 4 × NVIDIA H200. That is 16 GPU-hours." in told(gpus, 8)
    timed = told(gpus, 8, replace(cost, gpu_seconds=55_000.0))
    assert "on the clock, 15.3 hours of GPU time in all processes, on 8 ranks, each node with 4 × NVIDIA H200." in timed
    assert "processor time" not in timed and "GPU-hours" not in timed
    processor = {"gpus": {}, "cores": 2, "processor": "Fast CPU"}
    assert told(processor, 1).strip().endswith(", on 1 rank, each node with 2 cores of Fast CPU.")
    assert "is not at hand. It ran on 1 rank" in told(processor, 1, None)
    assert " on " not in card(plain, "", None).split("## Cost")[1].split("##")[0]


def test_this_machine_is_recorded_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = provenance(load_recipe(Path(__file__).parents[3] / "recipes" / "digits-amd.yaml"))
    assert found["ranks"] == 4 and found["machine"]["cores"] == os.cpu_count()
    assert sum(found["machine"]["gpus"].values()) == torch.cuda.device_count()
    assert set(found["machine"]) == {"system", "architecture", "processor", "cores", "gpus"}


def test_rewards_that_do_not_check_each_other_are_told(manifest: Manifest) -> None:
    text = card(tiny(manifest), "", None)
    assert "Trained on the reward `hpsv2.1`, held out: `pickscore` and `hpsv2`." in text
    assert "Note that hpsv2 is held out, but has learned from" in text
    alone = tiny(manifest, provenance={"recipe": RECIPE | {"heldout_rewards": []}})
    assert "no other reward was held out to check it" in card(alone, "", None)
    none = tiny(manifest, provenance={"recipe": {"name": "x"}})
    assert "No reward was used in training." in card(none, "", None)


def test_what_is_missing_is_said(manifest: Manifest) -> None:
    text = card(manifest, "", None)
    assert "None are recorded in the bundle." in text and "Not recorded: the run's log is not at hand." in text


def write_run(folder: Path, recipe: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_cost_is_summed_over_the_log(tmp_path: Path) -> None:
    lines = [
        {"iteration": 50, "seconds": 10.0, "cpu_seconds": 8.0, "forwards/teacher": 100, "reward": None},
        {"iteration": 100, "seconds": 12.0, "cpu_seconds": 9.0, "forwards/teacher": 50},
    ]
    run = write_run(tmp_path / "run", RECIPE, lines)
    assert read_cost(run, RECIPE) == Cost(100, 22.0, 17.0, {"teacher": 150.0})
    assert read_cost(run, RECIPE | {"betas": (0, 1)}) is not None
    run = write_run(run, RECIPE, [line | {"gpu_seconds": 60.0, "gpu_seconds/fake": 40.0} for line in lines])
    assert read_cost(run, RECIPE) == Cost(100, 22.0, 17.0, {"teacher": 150.0}, gpu_seconds=120.0)


def test_cost_of_another_run_is_not_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RECIPE | {"seed": 8}, [{"iteration": 1, "seconds": 1.0}])
    assert read_cost(run, RECIPE) is None and read_cost(tmp_path / "none", RECIPE) is None
    assert read_cost(write_run(run, RECIPE, [{"iteration": 1}]), RECIPE) is None
