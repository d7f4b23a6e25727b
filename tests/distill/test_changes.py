"""What two recipes differ in, and which differences make another stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.changes import changes
from distill.config import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def tree(*overrides: str) -> dict[str, Any]:
    return dict(load_recipe(RECIPES / "digits-amd.yaml", list(overrides)).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["log_every=7", "output=elsewhere", "parallel.strategy=fsdp", "telemetry.every=9", "keep_checkpoints=9"], []),
        (["student.learning_rate=0.5", "guidance=9"], ["guidance", "student.learning_rate"]),
        (["advantage.group=2"], ["advantage.group"]),
        (["data={prompts: mine.txt}"], ["data"]),
    ],
)
def test_changes_are_named_by_their_keys(overrides: list[str], told: list[str]) -> None:
    found = changes(tree(), tree(*overrides))
    assert sorted(change.key for change in found) == told and not any(change.of_stage for change in found)


@pytest.mark.parametrize("section", ["gan={}", "adapters={rank: 2}", "adaptation=null", "decoupled={}"])
def test_a_section_that_comes_or_goes_is_another_stage(section: str) -> None:
    for before, after in ((tree(), tree(section)), (tree(section), tree())):
        (change,) = changes(before, after)
        assert change.of_stage and change.key == section.partition("=")[0]


def test_options_of_later_versions_are_not_compared() -> None:
    old, new = tree(), tree("seed=5")
    del old["reward_tilt"], old["student"]["betas"]
    (change,) = changes(old, new)
    assert (change.key, change.before, change.after) == ("seed", 0, 5) and str(change) == "seed 0 → 5"
