"""The service beside the bare runtime, one picture or clip at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.latency import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_video_bundle"])
def test_a_service_is_timed_beside_its_runtime(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(kind)
    main([str(bundle), "--steps", "4", "--requests", "3", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    served, bare = found["service"], found["runtime"]
    assert served["n"] == bare["n"] == 3 and min(served["p50_ms"], bare["p50_ms"], served["ready_s"]) > 0
    assert 0.1 < found["cold_start_s"] < 60
    assert found["ratio_p50"] == pytest.approx(served["p50_ms"] / bare["p50_ms"], rel=0.01)
    if kind == "tiny_video_bundle":
        assert 0 < served["first_preview"]["p50_ms"] < served["p50_ms"]
    else:
        assert "first_preview" not in served
