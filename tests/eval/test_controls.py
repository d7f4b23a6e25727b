"""Controls: a metric that sees its canary, one that is blind, and one that cannot tell a bundle from itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.controls import invalid_metrics, run_controls
from eval.gates import Gates
from eval.metrics.base import Score
from eval.prompts import Prompt
from eval.sources import Source, open_source
from eval.statistics import bootstrap_mean
from eval.store import Store
from tests.eval.test_store import INFO

N = 40
GATES = Gates.model_validate(
    {
        "scores": [{"suite": "scenes-canary", "metric": "reward", "margin": 1.0}],
        "canaries": {
            "suite": "scenes-canary",
            "expect": [
                {"damage": "blurred", "metric": "reward", "at_least": 5.0},
                {"damage": "channels-swapped", "metric": "reward", "at_least": 5.0},
            ],
        },
    }
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        yield opened


def scorer(store: Store, change: Callable[[str], np.ndarray]) -> Any:
    """Scores that depend on what is measured: change(what) is added to the same base numbers."""
    base = np.random.default_rng(0).normal(60, 5, N)

    def score(source: Source, suite: str, samples: int | None, what: str, cached: bool) -> dict[str, Any]:
        assert (
            suite == "scenes-canary"
            and cached is (what != "A/A")
            and (what in ("control", "A/A") or what in source.name)
        )
        values = base + change(what)
        made = Score("reward", bootstrap_mean(values), N, "higher", "", 1, {}, values)
        run = store.begin(replace(INFO, label=what, expected=N))
        store.complete(run, [Prompt(f"p{i}", "a cube", i) for i in range(N)], [made])
        return store.run(run)

    return score


def controls(store: Store, tmp_path: Path, **drops: float) -> dict[str, Any]:
    noise = np.random.default_rng(1).normal(0, 0.3, N)
    change = scorer(
        store, lambda what: -drops.get(what.replace("/", "").replace("-", "_"), 0.0) + noise * (what != "control")
    )
    found = run_controls(store, open_source("renders"), GATES, change, tmp_path)
    return {"by": {control.damage: control for control in found}, "invalid": invalid_metrics(found)}


def test_a_metric_that_sees_its_canaries_is_believed(store: Store, tmp_path: Path) -> None:
    found = controls(store, tmp_path, blurred=8.0, channels_swapped=20.0)
    assert found["invalid"] == {} and list(found["by"]) == ["A/A", "blurred", "channels-swapped"]
    assert found["by"]["blurred"].change == pytest.approx(8.0, abs=0.3)


def test_a_blind_metric_is_not(store: Store, tmp_path: Path) -> None:
    found = controls(store, tmp_path, blurred=8.0, channels_swapped=3.0)
    assert not found["by"]["channels-swapped"].ok and found["by"]["blurred"].ok
    assert found["invalid"]["reward"].startswith("it missed its canary: channels-swapped made it worse by ")


def test_a_canary_that_got_better_is_a_miss_too(store: Store, tmp_path: Path) -> None:
    assert "reward" in controls(store, tmp_path, blurred=-30.0, channels_swapped=20.0)["invalid"]


def test_a_metric_that_tells_a_bundle_from_itself_is_not_believed(store: Store, tmp_path: Path) -> None:
    found = controls(store, tmp_path, blurred=8.0, channels_swapped=20.0, AA=2.0)
    assert found["invalid"]["reward"].startswith("it tells the bundle from itself: changed by ")
