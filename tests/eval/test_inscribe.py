"""Scores go into the manifest of exactly the weights that earned them, and change nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.bundle import Bundle
from eval.inscribe import main
from eval.metrics.base import Score
from eval.prompts import Prompt
from eval.statistics import bootstrap_mean
from eval.store import RunInfo, Store


def put(
    path: Path, prompts: list[Prompt], value: float, identity: dict[str, Any], suite: str = "scenes-trained"
) -> None:
    values = np.array([value - 1, value, value, value + 1])
    info = RunInfo(
        "row", "command", suite, {}, "scenes", {"name": "x", "identity": identity, "about": {}}, {}, {}, "", False, 4
    )
    with Store(path) as store:
        score = Score("reward", bootstrap_mean(values), 4, "higher", "", 1, {"weights": "0"}, values)
        store.complete(store.begin(info), prompts, [score])


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_the_newest_scores_of_these_weights_are_written(
    bundle: Path, tmp_path: Path, scene_prompts: Callable[[int], list[Prompt]]
) -> None:
    before, prompts, store = Bundle.open(bundle), scene_prompts(4), tmp_path / "s.sqlite"
    ours = {"digest": before.digest, "steps": 4}
    put(store, prompts, 3.0, ours)
    put(store, prompts, 5.0, ours)
    put(store, prompts, 7.0, ours | {"steps": 1})
    put(store, prompts, 9.0, {"digest": "another", "steps": 4}, suite="scenes-three")
    assert main([str(bundle), "--store", str(store)]) == 0
    after = Bundle.open(bundle)
    assert {s: v["reward"]["value"] for s, v in after.manifest.scores["scenes-trained"].items()} == {"4": 5.0, "1": 7.0}
    assert set(after.manifest.scores) == {"scenes-trained"}
    assert after.digest == before.digest
    assert after.manifest.model_copy(update={"scores": before.manifest.scores}) == before.manifest


def test_without_scores_the_bundle_stays_as_it_is(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / "bundle.json").read_bytes()
    assert main([str(bundle), "--store", str(tmp_path / "none.sqlite")]) == 3
    with Store(tmp_path / "empty.sqlite"):
        pass
    assert main([str(bundle), "--store", str(tmp_path / "empty.sqlite")]) == 3
    assert "holds no complete run" in capsys.readouterr().err
    assert (bundle / "bundle.json").read_bytes() == before
