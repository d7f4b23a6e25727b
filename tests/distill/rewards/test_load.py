"""Which folder or name gives which reward, and which gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.rewards import DigitClassifier, load_reward
from distill.rewards.weights import WeightsError


@pytest.mark.parametrize("config", [None, {}, {"model_type": "bert"}])
def test_folders_without_a_reward_are_refused(tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no reward; give a folder with a CLIPModel, a video reward or"):
        load_reward(tmp_path)


def test_a_folder_of_ours_loads_by_its_path(tmp_path: Path) -> None:
    DigitClassifier(8).save(tmp_path / "judge", 0.5)
    assert isinstance(load_reward(str(tmp_path / "judge")), DigitClassifier)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "imagereward", "pickscore", "clip", "dinov2", "videoalign"])
def test_published_weights_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(WeightsError, match=f"^{name}: .*hf download somebody/never-downloaded"):
        load_reward(f"{name}:somebody/never-downloaded")
    with pytest.raises(WeightsError, match=f"^{name}: there is no .*folder './nowhere'; give one, or a hub id"):
        load_reward(f"{name}:./nowhere")


def test_a_misspelt_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"'hpsv3' is no reward's name and no folder; did you mean hpsv2"):
        load_reward("hpsv3")
