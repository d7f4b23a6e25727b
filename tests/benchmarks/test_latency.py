"""The service beside the bare runtime, one picture or clip at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.latency import main, paired

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_video_bundle"])
def test_a_service_is_timed_beside_its_runtime(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(kind)
    main([str(bundle), "--steps", "4", "--requests", "3", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    served, bare = found["service"], found["runtime"]
    assert served["n"] == bare["n"] == 3 and min(served["p50_ms"], bare["p50_ms"], served["ready_s"]) > 0
    assert 0.1 < found["cold_start_s"] < 60
    assert found["ratio_p50"] > 0 and found["overhead_p50_ms"] > -bare["p99_ms"]
    if kind == "tiny_video_bundle":
        assert 0 < served["first_preview"]["p50_ms"] < served["p50_ms"]
    else:
        assert "first_preview" not in served


def test_what_a_service_adds_is_a_median_over_pairs() -> None:
    """A machine that is three times as slow for one pair changes neither number much."""
    assert paired([10.0, 30.0, 10.0], [12.0, 33.0, 13.0]) == {"ratio_p50": 1.2, "overhead_p50_ms": 3.0}
