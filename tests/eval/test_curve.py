"""The curve over steps: every metric with a canary at every number of steps, and turns that are sure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval.curve import step_curve
from eval.gates import Gates
from eval.metrics.base import Score
from eval.pairing import retention
from eval.prompts import Prompt
from eval.report import curve_cells, score_cells
from eval.sources import BundleSource
from eval.statistics import bootstrap_mean
from eval.store import Store
from tests.eval.nights import row
from tests.eval.test_store import INFO

GATES = Gates.model_validate(
    {
        "scores": [{"suite": "scenes-trained", "metric": "composition", "margin": 3.0}],
        "canaries": {
            "suite": "scenes-canary",
            "expect": [
                {"damage": "prompt-ignored", "metric": "composition", "at_least": 60},
                {"damage": "channels-swapped", "metric": "composition", "at_least": 30},
            ],
        },
    }
)
N = 64


def kept(store: Store, values: np.ndarray, metric: str = "composition", **more: Any) -> dict[str, Any]:
    """A complete run of one metric; per sample as given."""
    score = Score(metric, bootstrap_mean(values), N, "higher", "%", 1, {}, values)
    run = store.begin(replace(INFO, expected=N))
    store.complete(run, [Prompt(f"p{i}", "a cube", i) for i in range(N)], [replace(score, **more)])
    return store.run(run)


def curve(tmp_path: Path, means: dict[int, float]) -> tuple[list[dict[str, Any]], list[str]]:
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 5, N)
    with Store(tmp_path / "s.sqlite") as store:
        runs = {steps: kept(store, mean + spread + rng.normal(0, 1, N)) for steps, mean in means.items()}
        source: Any = SimpleNamespace(manifest=SimpleNamespace(samplers=dict.fromkeys(reversed(means))))
        return step_curve(store, source, GATES, runs.__getitem__)


def test_every_number_of_steps_is_a_point_and_a_rise_is_no_turn(tmp_path: Path) -> None:
    points, turns = curve(tmp_path, {1: 60.0, 2: 80.0, 4: 90.0, 8: 89.0})
    assert [(p["steps"], round(p["value"], -1)) for p in points] == [(1, 60), (2, 80), (4, 90), (8, 90)]
    assert all(p["low"] < p["value"] < p["high"] and p["metric"] == "composition" for p in points)
    assert turns == [], "a drop by 1 is sure, but less than a tenth of the smallest canary"
    table = curve_cells(points)
    assert table is not None and table["steps"] == [1, 2, 4, 8] and table["rows"][0][0] == "composition ↑"


def test_a_sure_drop_is_a_turn_and_names_both_ends(tmp_path: Path) -> None:
    _, turns = curve(tmp_path, {1: 60.0, 2: 80.0, 4: 70.0})
    assert len(turns) == 1 and turns[0].startswith("4 steps are worse than 2 in composition, by ")


def test_one_number_of_steps_has_no_curve(tmp_path: Path) -> None:
    assert curve(tmp_path, {4: 70.0}) == ([], []) and curve_cells([]) is None


def test_a_real_bundle_is_the_same_with_its_own_steps_and_another_with_others(tiny_bundle: Path) -> None:
    source = BundleSource(tiny_bundle, steps=2, threads=1, batch=4)
    other = source.at_steps(1)
    assert source.at_steps(2).identity == source.identity and other.identity != source.identity
    assert (other.steps, source.steps) == (1, 2) and other.name == "tiny-sdxl, 1 steps"
    prompts = [Prompt("p", "a red cube", 3)]
    alone = BundleSource(tiny_bundle, steps=1, threads=1, batch=4)
    assert np.array_equal(other.make(prompts), alone.make(prompts)) and other.identity == alone.identity


def test_what_is_left_of_the_teacher_has_the_interval_of_a_ratio_of_paired_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    teacher = rng.uniform(80, 100, N)
    with Store(tmp_path / "s.sqlite") as store:
        runs = {name: kept(store, values) for name, values in {"a": teacher, "b": 0.9 * teacher}.items()}
        same, less = (retention(store, runs[name], runs["a"], "composition") for name in "ab")
        assert same is not None and less is not None
        assert same.value == pytest.approx(100) and less.value == pytest.approx(90)
        assert less.se == pytest.approx(0, abs=1e-9), "every prompt lost the same share"
        noisy = retention(store, kept(store, teacher + rng.normal(0, 10, N)), runs["a"], "composition")
        assert noisy is not None and noisy.se == pytest.approx(100 * 10 / 90 / N**0.5, rel=0.2)
        distance = kept(store, teacher, direction="lower")
        assert retention(store, distance, runs["a"], "composition") is None
    shown = row(teacher={"delta": -9.0, "low": -10.0, "high": -8.0, "retention": {"value": 90, "low": 89, "high": 91}})
    assert score_cells(shown)["teacher"].endswith("keeps 90.0 % [89.0, 91.0]")
