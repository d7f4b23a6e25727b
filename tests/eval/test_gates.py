"""Gate files: the shipped ones load, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.errors import EvalError
from eval.gates import GATES, load_gates
from eval.prompts import load_suite


@pytest.mark.parametrize("name", [path.stem for path in sorted(GATES.glob("*.yaml"))])
def test_shipped_gates_name_metrics_of_their_suites(name: str) -> None:
    gates = load_gates(name)
    for gate in (*gates.scores, *gates.costs):
        assert gate.metric in load_suite(gate.suite).metrics, gate.key
    assert gates.canaries is not None
    canary = load_suite(gates.canaries.suite)
    assert {expected.metric for expected in gates.canaries.expect} <= canary.metrics.keys()
    gated = {gate.metric for gate in gates.scores}
    assert gated == {expected.metric for expected in gates.canaries.expect}, "every gated score has a canary"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [{"suite": "scenes-fid", "metric": "fidd", "margin": 1}]}, "did you mean 'fid'"),
        ({"scores": [{"suite": "scenes-fit", "metric": "fid", "margin": 1}]}, "did you mean 'scenes-fid'"),
        ({"scores": [{"suite": "scenes-fid", "metric": "fid", "margin": 0}]}, "greater than 0"),
        ({"scores": [{"suite": "scenes-fid", "metric": "fid", "margn": 1}]}, "scores.0.margin"),
        ({"scorse": []}, "did you mean 'scores'"),
        ({"guards": [{"up": "scenes-fid/kid", "down": "scenes-fid/fid", "because": "x"}]}, "has no gate"),
        ({"canaries": {"suite": "scenes-fid", "expect": [{"damage": "blured", "metric": "fid", "at_least": 1}]}},
         "did you mean 'blurred'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = {"scores": [{"suite": "scenes-fid", "metric": "fid", "margin": 1}]} | change
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(EvalError, match=message):
        load_gates(str(path))


def test_two_gates_of_one_measure_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump({"scores": [{"suite": "scenes-fid", "metric": "fid", "margin": 1}] * 2}))
    with pytest.raises(EvalError, match="scenes-fid/fid has two gates"):
        load_gates(str(path))
    with pytest.raises(EvalError, match="did you mean 'scenes-sdxl'"):
        load_gates("scenes-sdlx")
