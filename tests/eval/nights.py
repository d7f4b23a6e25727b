"""Records of nights as eval.night makes them, and a metric without a network, for tests of nights."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean

KEYS = ("scenes-trained/composition", "scenes-fid/kid")


def row(key: str = KEYS[0], verdict: str = "equivalent", delta: float = 0.0, **more: Any) -> dict[str, Any]:
    """A gate's row; delta is positive where it is better."""
    suite, metric = key.split("/")
    lower = metric in ("kid", "latency")
    base = 90.0
    value = base + (-delta if lower else delta)
    return {
        "key": key, "suite": suite, "metric": metric, "verdict": verdict, "note": "", "watched": False, "drift": False,
        "unit": "" if lower else "%", "direction": "lower" if lower else "higher",
        "candidate": {"value": value, "low": value - 2, "high": value + 2, "n": 1000, "smallest_n": 200},
        "baseline": {"value": base, "low": base - 2, "high": base + 2, "n": 1000, "smallest_n": 200},
        "change": {"delta": delta, "low": delta - 1, "high": delta + 1, "se": 0.5, "worse": 0.5, "better": 0.5, "n": 9},
        "p": 0.5, "margin": 3.0, "mde": 1.6, "suspected": verdict == "regression", "confirmation": None,
    } | more  # fmt: skip


def record(*rows: dict[str, Any], night: str = "2026-11-20", **more: Any) -> dict[str, Any]:
    verdicts = [r["verdict"] for r in rows]
    verdict = next((v for v in ("regression", "broken", "invalid") if v in verdicts), verdicts[0])
    return {
        "night": night, "bundle": "tiny", "path": "bundles/tiny", "verdict": verdict, "rows": list(rows), "runs": {},
        "baseline": {"pinned": "2026-11-01T00:00:00", "reason": "first", "digest": "d" * 64, "runs": {}},
        "controls": [{"damage": "blurred", "metric": "kid", "expected": 0.1, "change": 0.4, "p": 0.0, "ok": True}],
        "trade_offs": [], "failures": [], "environment": {"runtime": "onnx"}, "changes": [], "since": None,
        "seconds": 12.0, "cost": {"scenes-trained": 10.0}, "finished": f"{night}T02:10:00+00:00", "alert": None,
        "started": f"{night}T02:00:00+00:00",
    } | more  # fmt: skip


@register
class Contrast(PerSampleMetric):
    """Standard deviation of a picture's pixels, which blur and a faint decoder lower."""

    name = "test-contrast"
    direction = "higher"
    unit = ""
    smallest_n = 5

    def update(self, samples: Samples) -> None:
        self._add(samples.images.std(axis=(1, 2, 3), dtype=np.float64), samples)

    def compute(self) -> Score:
        values = np.array(self._values)
        return self._score(bootstrap_mean(values, self._clusters), values, {}).check()
