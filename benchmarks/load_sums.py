"""What a load test found, in numbers: of one run of one trace, between keys, against the bare runtime, over time."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.load_client import Outcome, Sent
from benchmarks.load_servers import Sample
from distill.bundle import Bundle, Manifest
from service.clips import Clip
from service.encode import encode
from service.runtimes import Runtime, generate
from service.runtimes.base import Images

CONFIRM = ("ok", "rejected", "deadline", "invalid", "cancelled")
"""Outcomes that both sides see alike."""
WINDOW_S = 5.0
FLAT = 0.05
"""Part by which memory may grow from the second to the last quarter of an overload."""
BACK = 1.25
"""p99 is back when it is this many times what it was before."""


def summarise(sent: Sequence[Sent], seconds: float, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """One run of one trace: counts by outcome, latencies of what was answered, goodput, fairness, errors of the ETA."""
    answered = [s for s in sent if s.outcome == "ok"]
    good = [s for s in answered if s.latency_ms <= slo_ms[s.arrival.work]]
    wanted = [s for s in sent if s.arrival.kind == "ordinary"]
    outcomes = Counter(s.outcome for s in sent)
    result: dict[str, Any] = {
        "sent": len(sent),
        **{name: outcomes[name] for name in get_args(Outcome)},
        "throughput": round(sum(s.arrival.at + s.latency_ms / 1e3 <= seconds for s in answered) / seconds, 3),
        "goodput": round(len(good) / seconds, 3),
        "in_time": round(sum(s.arrival.kind == "ordinary" for s in good) / max(1, len(wanted)), 4),
        "latency_ms": quantiles([s.latency_ms for s in answered]),
        "latency_ms_by_work": {
            work: quantiles([s.latency_ms for s in answered if s.arrival.work == work]) for work in slo_ms
        },
        "queue_ms": quantiles([s.metrics["queue_ms"] for s in answered if "queue_ms" in s.metrics]),
        "service_ms": quantiles(
            [s.metrics["total_ms"] - s.metrics["queue_ms"] for s in answered if "queue_ms" in s.metrics]
        ),
        "first_preview_ms": quantiles([s.first_preview_ms for s in answered if s.first_preview_ms is not None]),
        "client_late_ms": quantiles([s.late_ms for s in sent]),
        "bytes_per_s": round(sum(s.received for s in sent) / seconds),
        "fairness_works": fairness(wanted, good, lambda s: s.arrival.work),
        "fairness_keys": fairness(wanted, good, lambda s: str(s.arrival.key)),
    }
    errors = [abs(s.eta_ms - s.latency_ms) / s.latency_ms for s in answered if s.eta_ms is not None]
    if errors:
        result["eta_error"] = {"n": len(errors), "p50": _quantile(errors, 50), "p90": _quantile(errors, 90)}
    return result


def fairness(wanted: Sequence[Sent], good: Sequence[Sent], group: Any) -> dict[str, Any] | None:
    """Jain's index (Σx)²/(n·Σx²) over groups, x = answers in time over the group's max-min share of them all; and the
    part of each group's requests that was in time. 1: nobody got more at the cost of others. None: one group alone.
    """
    demands = Counter(group(s) for s in wanted)
    served = Counter(group(s) for s in good)
    if len(demands) < 2 or not good:
        return None
    shares = max_min(demands, len(good))
    x = np.array([served[name] / shares[name] for name in demands])
    in_time = {name: round(served[name] / demands[name], 4) for name in sorted(demands)}
    return {"jain": round(float(x.sum() ** 2 / (len(x) * (x**2).sum())), 4), "in_time": in_time}


def max_min(demands: Mapping[str, float], total: float) -> dict[str, float]:
    """Shares of a total: nobody gets more than he asks for, and what is left is divided equally among the others."""
    shares, left = dict[str, float](), total
    for place, name in enumerate(sorted(demands, key=lambda name: demands[name])):
        shares[name] = min(demands[name], left / (len(demands) - place))
        left -= shares[name]
    return shares


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = (_quantile(values, percent) for percent in (50, 90, 99))
    return {"p50": p50, "p90": p90, "p99": p99, "max": round(max(values), 3)}


def _quantile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)


def file_of(pixels: Images, manifest: Manifest) -> bytes:
    """What a server sends of a picture or a clip: PNG or MP4."""
    if not manifest.frames:
        return encode(pixels, "png")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with Clip(path, "mp4", (pixels.shape[2], pixels.shape[1]), manifest.fps) as clip:
            clip.write(pixels)
        return path.read_bytes()


def wrong_files(sent: Sequence[Sent], runtime: Runtime, bundle: Bundle) -> tuple[int, int]:
    """(compared, different): the kept answers against the same ones made alone, byte for byte."""
    chosen, different = [s for s in sent if s.file is not None], 0
    for s in chosen:
        a = s.arrival
        alone = generate(runtime, bundle.manifest, [a.prompt], [a.seed], a.steps, frames=a.frames or None)[0]
        different += s.file != file_of(alone, bundle.manifest)
    return len(chosen), different


def agree(sent: Sequence[Sent], before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the server counted every request once, and as the client saw it.

    Where clients left, the server may have been done already, or have refused. Oversized bodies never reach its count.
    """
    seen: Counter[str] = Counter(s.outcome for s in sent if s.arrival.kind != "oversize")
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in after}
    beyond = {name: grown.get(name, 0) - seen[name] for name in CONFIRM}
    counted = sum(beyond.values()) + grown.get("disconnected", 0)
    return all(more >= 0 for more in beyond.values()) and counted == seen["disconnected"]


def over_time(sent: Sequence[Sent], seconds: float) -> list[dict[str, Any]]:
    """By WINDOW_S of scheduled time: what became of it."""
    rows = []
    for k in range(int(np.ceil(seconds / WINDOW_S))):
        here = [s for s in sent if k * WINDOW_S <= s.arrival.at < (k + 1) * WINDOW_S]
        latency = quantiles([s.latency_ms for s in here if s.outcome == "ok"])
        outcomes = Counter(s.outcome for s in here)
        rows.append(
            {"at_s": k * WINDOW_S, "latency_ms": latency, "ok": outcomes["ok"], "rejected": outcomes["rejected"]}
        )
    return rows


def recovery(
    sent: Sequence[Sent], samples: Sequence[Sample], begun: float, calm_s: float, overload_s: float
) -> dict[str, Any]:
    """An overload between two calm times: when the queue was empty again, p99 before and after that, and memory.

    begun: the trace's first second on the clock of the samples.
    """
    end = calm_s + overload_s
    empty = [s.at - begun for s in samples if s.at - begun >= end and s.waiting == 0]
    drain_s = max(0.0, empty[0] - end) if empty else float("inf")
    before = quantiles([s.latency_ms for s in sent if s.outcome == "ok" and s.arrival.at < calm_s])
    after = quantiles([s.latency_ms for s in sent if s.outcome == "ok" and s.arrival.at >= end + drain_s])
    quarters = [
        [s.rss_mb for s in samples if k / 4 <= (s.at - begun - calm_s) / overload_s < (k + 1) / 4] for k in range(4)
    ]
    growth = float(np.median(quarters[3]) / np.median(quarters[1]) - 1) if quarters[1] and quarters[3] else float("nan")
    return {
        "calm_s": calm_s,
        "overload_s": overload_s,
        "drain_s": round(drain_s, 2),
        "latency_ms_before": before,
        "latency_ms_after": after,
        "returned": before is not None and after is not None and after["p99"] <= BACK * before["p99"],
        "memory_mb": {"first": round(samples[0].rss_mb, 1), "most": round(max(s.rss_mb for s in samples), 1)},
        "memory_growth": round(growth, 4),
        "memory_flat": growth < FLAT,
        "windows": over_time(sent, 2 * calm_s + overload_s),
        "memory": [[round(s.at - begun, 1), round(s.rss_mb, 1)] for s in samples],
        "waiting": [[round(s.at - begun, 1), s.waiting] for s in samples],
    }
