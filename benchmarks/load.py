"""Load test: our service against servers with other policies, on the same model, runtime and trace, in one run.

    python -m benchmarks.load bundles/scenes-sdxl --seconds 60 --repeats 3

For every repeat and server it starts the server, measures each number of steps alone, then the throughput of a closed
loop, and then sends the trace at every rate, in parts of the bare runtime's best rate. Goodput is the rate of answers
within twice the solo latency of the fastest server, by number of steps. "ours, deadlines" sends that time as
deadline_ms, which only ours knows. Every 20th picture is compared with the bare runtime's, byte for byte.

Results go beside this file as JSON and as a page with plots.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.latency import processor
from benchmarks.load_client import Sent, replay, saturate
from benchmarks.load_report import write_report
from benchmarks.load_traces import TRACES, Arrival, make_trace
from distill.bundle import Bundle
from service.encode import encode
from service.runtimes import Runtime, generate, open_runtime

SERVERS = ("ours", "ours, deadlines", "batching", "serial")
SLO = 2.0
"""Times the solo latency."""
SOLO_REQUESTS = 7
CHECK_EVERY = 20
READY_S = 120.0


@dataclass(frozen=True)
class Running:
    port: int
    process: subprocess.Popen[bytes]


@contextmanager
def start(server: str, bundle: Path, threads: int, port: int) -> Iterator[Running]:
    """One server in a process of its own, ready."""
    with tempfile.TemporaryDirectory() as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LEAPFROG_")}
        environment |= {"BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True", "LEAPFROG_THREADS": str(threads)}
        environment |= {"LEAPFROG_BUNDLES": str(bundle.resolve())}
        command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
        if not server.startswith("ours"):
            command = [sys.executable, "-m", "benchmarks.load_baselines", server, str(bundle)]
            command += ["--port", str(port), "--threads", str(threads)]
        log = Path(home) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        try:
            _wait_until_ready(port, process, log)
            yield Running(port, process)
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"a server did not become ready in {READY_S:.0f} s; its log:\n{log.read_text()[-3000:]}")


def best_rate(runtime: Runtime, bundle: Bundle, steps: Sequence[int], seconds: float = 2.0) -> float:
    """Pictures per second of the bare runtime in its best batches, for every number of steps equally often.

    The time of one call after another in this process: text, steps at each batch size, decoding.
    """
    best = float("inf")
    for size in runtime.capabilities.batch_sizes:
        times: list[float] = []
        end = time.perf_counter() + seconds / len(runtime.capabilities.batch_sizes)
        while time.perf_counter() < end or not times:
            begun = time.perf_counter()
            for count in steps:
                generate(runtime, bundle.manifest, ["a red cube"] * size, range(size), count)
            times.append((time.perf_counter() - begun) / (size * len(steps)))
        best = min(best, median(times))
    return 1.0 / best


def solo_ms(port: int, steps: Sequence[int]) -> dict[int, float]:
    """Median latency of one client that waits for every answer, by number of steps."""

    async def measure(count: int) -> float:
        times = []
        for seed in range(SOLO_REQUESTS):
            (sent,) = await replay(port, [Arrival(0.0, f"a red cube {seed}", seed, count)])
            times.append(sent.latency_ms)
        return median(times[1:])

    return {count: asyncio.run(measure(count)) for count in steps}


def summarise(sent: Sequence[Sent], seconds: float, slo_ms: Mapping[int, float]) -> dict[str, Any]:
    """One run of one trace: counts by outcome, latencies of what was answered, goodput and errors of the ETA."""
    pictures = [s for s in sent if s.outcome == "ok"]
    good = [s for s in pictures if s.latency_ms <= slo_ms[s.arrival.steps]]
    outcomes = Counter(s.outcome for s in sent)
    result: dict[str, Any] = {
        "sent": len(sent),
        **{name: outcomes[name] for name in ("ok", "rejected", "deadline", "invalid", "disconnected", "failed")},
        "throughput": round(len(pictures) / seconds, 3),
        "goodput": round(len(good) / seconds, 3),
        "in_time": round(len(good) / max(1, sum(s.arrival.kind == "picture" for s in sent)), 4),
        "latency_ms": quantiles([s.latency_ms for s in pictures]),
        "latency_ms_by_steps": {
            str(count): quantiles([s.latency_ms for s in pictures if s.arrival.steps == count])
            for count in sorted(slo_ms)
        },
        "client_late_ms": quantiles([s.late_ms for s in sent]),
    }
    errors = [abs(s.eta_ms - s.latency_ms) / s.latency_ms for s in pictures if s.eta_ms is not None]
    if errors:
        result["eta_error"] = {"n": len(errors), "p50": _quantile(errors, 50), "p90": _quantile(errors, 90)}
    if queues := [s.metrics["queue_ms"] for s in pictures if s.metrics]:
        result["queue_ms"] = quantiles(queues)
    return result


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "p50": _quantile(values, 50),
        "p90": _quantile(values, 90),
        "p99": _quantile(values, 99),
        "max": max(values),
    }


def _quantile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)


def wrong_pictures(sent: Sequence[Sent], runtime: Runtime, bundle: Bundle) -> tuple[int, int]:
    """(compared, different): every 20th picture against the same one made alone, byte for byte."""
    chosen = [s for s in sent if s.b64_json is not None][::CHECK_EVERY]
    different = 0
    for s in chosen:
        alone = generate(runtime, bundle.manifest, [s.arrival.prompt], [s.arrival.seed], s.arrival.steps)[0]
        different += base64.b64decode(s.b64_json or "") != encode(alone, "png")
    return len(chosen), different


def served_outcomes(port: int) -> dict[str, float]:
    """What the server counted, by outcome."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counts: Counter[str] = Counter()
    for line in lines:
        if line.startswith("leapfrog_requests_total{"):
            counts[line.partition('outcome="')[2].partition('"')[0]] += float(line.rsplit(" ", 1)[1])  # type: ignore[assignment]
    return dict(counts)


class Run:
    """One load test: what was asked for, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.bundle = Bundle.open(options.bundle)
        self.steps = sorted(count for count in self.bundle.manifest.samplers if count <= 8)
        self.runtime = open_runtime(self.bundle, threads=options.threads, max_batch=8)
        self.capacity = best_rate(self.runtime, self.bundle, self.steps)
        self.solo: dict[str, dict[int, float]] = {}
        self.saturation: dict[str, list[float]] = {}
        self.sent: dict[tuple[str, float], list[list[Sent]]] = {}
        self.metrics_agree: list[bool] = []
        self.port = options.port

    def server(self, name: str) -> None:
        """Everything that is measured of one start of one server. Solo latencies of all come before any deadline."""
        options = self.options
        with start(name, options.bundle, options.threads, self.port) as running:
            self.say(f"{name}: alone")
            alone = solo_ms(running.port, self.steps)
            kept = self.solo.setdefault(name, alone)
            self.solo[name] = {count: min(kept[count], alone[count]) for count in self.steps}
            self.say(f"{name}: closed loop")
            closed = make_trace("mixed", self.capacity * 4, options.seconds, self.steps)
            rate = asyncio.run(saturate(running.port, closed, 16, min(10.0, options.seconds)))
            self.saturation.setdefault(name, []).append(round(rate, 3))
            for part in options.rates:
                self.say(f"{name}: {options.trace} at {part:g} of {self.capacity:.1f} per second")
                arrivals = make_trace(options.trace, part * self.capacity, options.seconds, self.steps)
                before = served_outcomes(running.port) if name.startswith("ours") else {}
                deadline = (lambda count: round(self.slo_ms[count])) if name == "ours, deadlines" else None
                sent = asyncio.run(
                    replay(running.port, arrivals, deadline_ms=deadline, estimates=name.startswith("ours"))
                )
                if before or name.startswith("ours"):
                    self.metrics_agree.append(_agree(sent, before, served_outcomes(running.port)))
                self.sent.setdefault((name, part), []).append(sent)
                time.sleep(1.0)
        self.port += 1

    @property
    def slo_ms(self) -> dict[int, float]:
        return {count: SLO * min(alone[count] for alone in self.solo.values()) for count in self.steps}

    def result(self) -> dict[str, Any]:
        options = self.options
        rows, compared, different = [], 0, 0
        for (name, part), repeats in self.sent.items():
            for sent in repeats:
                checked, wrong = wrong_pictures(sent, self.runtime, self.bundle)
                compared, different = compared + checked, different + wrong
            runs = [summarise(sent, options.seconds, self.slo_ms) for sent in repeats]
            goodput = [run["goodput"] for run in runs]
            rows.append(
                {
                    "server": name,
                    "rate": part,
                    "goodput": median(goodput),
                    "goodput_spread": [min(goodput), max(goodput)],
                    "runs": runs,
                }
            )
        return {
            "bundle": self.bundle.manifest.name,
            "digest": self.bundle.digest,
            "trace": options.trace,
            "seconds": options.seconds,
            "repeats": options.repeats,
            "threads": options.threads,
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("bentoml", "fastapi", "onnxruntime", "numpy", "uvicorn")},
            "revision": _revision(),
            "capacity_per_s": round(self.capacity, 3),
            "solo_ms": {name: {str(k): round(v, 2) for k, v in alone.items()} for name, alone in self.solo.items()},
            "slo_ms": {str(k): round(v, 2) for k, v in self.slo_ms.items()},
            "saturation_per_s": self.saturation,
            "rows": rows,
            "pictures_compared": compared,
            "pictures_different": different,
            "metrics_agree": all(self.metrics_agree),
        }

    @staticmethod
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _agree(sent: Sequence[Sent], before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the server counted what the clients saw. Oversized bodies never reach the counter of pictures."""
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in after}
    seen = Counter(s.outcome for s in sent if s.arrival.kind != "oversize")
    return all(grown.get(name, 0) == seen[name] for name in ("ok", "rejected", "deadline", "invalid"))


def _revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Goodput and latency under load: our service against other policies.",
        epilog="example: python -m benchmarks.load bundles/scenes-sdxl --trace mixed --seconds 60 --repeats 3",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--trace", choices=TRACES, default="mixed")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each trace")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.6, 0.8, 1.0, 1.2], help="parts of capacity")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of one graph run")
    parser.add_argument("--port", type=int, default=3100, help="the first of several")
    parser.add_argument("--out", type=Path, default=here / "results" / "load.json")
    options = parser.parse_args()
    run = Run(options)
    # Those that send deadlines come last: they need everybody's solo latency.
    for _ in range(options.repeats):
        for name in sorted(options.servers, key=lambda name: name == "ours, deadlines"):
            run.server(name)
    for path in write_report(run.result(), options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
