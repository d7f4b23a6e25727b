"""Names of rewards in recipes, and what is said of rewards that cannot check each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill.reward_names import KINDS, overlaps, parse_reward, reads_latents
from distill.rewards.load import _LOADERS


def test_names_folders_and_sources() -> None:
    assert parse_reward("hpsv2.1") == ("hpsv2.1", "")
    assert parse_reward("pickscore:/models/pick") == ("pickscore", "/models/pick")
    assert parse_reward("clip:openai/clip-vit-base-patch32") == ("clip", "openai/clip-vit-base-patch32")
    assert parse_reward("models/scenes-reward") == (None, "models/scenes-reward")


def test_a_reward_of_latents_is_known_by_its_folder(tmp_path: Path) -> None:
    for kind in ("latent-reward", "video-reward"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"kind": kind}))
    names = [str(tmp_path / "latent-reward"), str(tmp_path / "video-reward"), "hpsv2", str(tmp_path / "nowhere")]
    assert [reads_latents(name) for name in names] == [True, False, False, False]


def test_every_name_has_a_loader() -> None:
    assert set(KINDS) == set(_LOADERS)


@pytest.mark.parametrize(("name", "hint"), [("hpsv21", "did you mean hpsv2.1?"), ("aesthetic:x", "known are hpsv2, ")])
def test_near_misses_are_told(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="is no reward's name and no folder") as told:
        parse_reward(name)
    assert hint in str(told.value)


def test_a_folder_may_be_named_like_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    assert parse_reward("clips") == (None, "clips")


def test_rewards_of_one_origin_do_not_check_each_other() -> None:
    assert overlaps("hpsv2.1", ["pickscore", "imagereward", "clip"]) == []
    (same,) = overlaps("hpsv2.1", ["pickscore", "hpsv2:/models/hps"])
    assert "hpsv2:/models/hps is held out, but has learned from HPDv2's human preferences" in same
    (none,) = overlaps("models/scenes-reward", [])
    assert "models/scenes-reward trains and nothing is held out: name heldout_rewards" in none
    assert overlaps("models/scenes-reward", ["models/scenes-clip"]) == []


def test_recipes_are_read_without_torch() -> None:
    code = "import sys, distill.reward_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
