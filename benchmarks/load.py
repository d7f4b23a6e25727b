"""Load test: our service against servers with other policies, on the same model, runtime and traces, in one run.

    python -m benchmarks.load bundles/scenes-sdxl --seconds 60 --repeats 3
    python -m benchmarks.load bundles/scenes-sdxl --traces mixed burst abuse tenants --recovery 600

For every repeat and server it starts the server, measures each kind of request alone, then the throughput of closed
loops, as a part of the bare runtime's best rate just before and after, since machines change their speed, and then
sends traces open loop: the first at every rate, the others at one; rates are parts of the bare runtime's best rate.
Goodput is the rate of answers within twice the solo latency of the fastest server, by number of steps. Every 20th
answer is compared with the bare runtime's, byte for byte, and every request must be accounted for on both sides.
--recovery sends twice the capacity to ours for that many seconds and looks at what comes after.

Client and servers get cores of their own where there are four or more. What is measured of the first requests to a
server is thrown away. Results go beside this file as JSON and as a page with plots.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.latency import processor
from benchmarks.load_client import Sent, Target, replay, saturate
from benchmarks.load_report import write_report
from benchmarks.load_servers import KEYS, SERVERS, Running, Watch, served_outcomes, start
from benchmarks.load_sums import agree, recovery, summarise, wrong_files
from benchmarks.load_traces import TRACES, Arrival, Trace, make_trace
from distill.bundle import Bundle
from service.runtimes import Runtime, generate, open_runtime

SLO = 2.0
"""Times the solo latency."""
SOLO_REQUESTS = 9
WARM_REQUESTS = 2
CALM, OVERLOAD = 0.5, 2.0
"""Parts of capacity before, during and after an overload."""
SETTLE_S = 10.0
"""In which a server must have counted what its clients have seen."""


def best_rate(runtime: Runtime, bundle: Bundle, works: Sequence[Arrival], seconds: float = 2.0) -> float:
    """Answers per second of the bare runtime in its best batches, for every kind of request equally often.

    The time of one call after another in this process: text, steps at each batch size, decoding.
    """
    best = float("inf")
    for size in runtime.capabilities.batch_sizes:
        times: list[float] = []
        end = time.perf_counter() + seconds / len(runtime.capabilities.batch_sizes)
        while time.perf_counter() < end or not times:
            begun = time.perf_counter()
            for work in works:
                prompts = ["a red cube"] * size
                generate(runtime, bundle.manifest, prompts, range(size), work.steps, frames=work.frames or None)
            times.append((time.perf_counter() - begun) / (size * len(works)))
        best = min(best, median(times))
    return 1.0 / best


def solo_ms(target: Target, works: Sequence[Arrival]) -> dict[str, float]:
    """Median latency of one client that waits for every answer, by kind of request."""
    simple = replace(target, ours=False)

    async def measure(work: Arrival) -> float:
        times = []
        for seed in range(SOLO_REQUESTS):
            (sent,) = await replay(simple, [replace(work, prompt=f"a red cube {seed}", seed=seed)])
            if sent.outcome != "ok":
                raise SystemExit(f"a server answered a request that came alone with {sent.outcome}; see its log")
            times.append(sent.latency_ms)
        return median(times[WARM_REQUESTS:])

    return {work.work: asyncio.run(measure(work)) for work in works}


class Run:
    """One load test: what was asked for, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.bundle = Bundle.open(options.bundle)
        manifest = self.bundle.manifest
        self.steps = sorted(count for count in manifest.samplers if count <= 8)
        self.frames = sorted(manifest.frames) or [0]
        self.works = [Arrival(0.0, "", 0, count, frames=n) for count in self.steps for n in self.frames]
        self.client_cores, self.server_cores = divide(sorted(os.sched_getaffinity(0)))
        threads = options.threads or len(self.server_cores)
        self.threads = threads
        self.runtime = open_runtime(self.bundle, threads=threads, max_batch=8)
        self.capacity = best_rate(self.runtime, self.bundle, self.works, seconds=8.0)
        os.sched_setaffinity(0, self.client_cores)
        self.keys = KEYS if "tenants" in options.traces else ()
        self.solo: dict[str, dict[str, float]] = {}
        self.saturation: dict[str, dict[str, list[float]]] = {}
        self.saturation_parts: dict[str, dict[str, list[float]]] = {}
        self.runs: dict[tuple[Trace, str, float], list[dict[str, Any]]] = {}
        self.sent: dict[tuple[Trace, str, float], list[list[Sent]]] = {}
        self.metrics_agree: list[bool] = []
        self.recovered: dict[str, Any] | None = None
        self.port = options.port

    def server(self, name: str, repeat: int) -> None:
        """Everything that is measured of one start of one server. Solo latencies of all come before any deadline."""
        with self.started(name) as running:
            self.say(f"{name}: alone")
            alone = solo_ms(running.target, self.works)
            kept = self.solo.setdefault(name, alone)
            self.solo[name] = {work: min(kept[work], alone[work]) for work in alone}
            for clients in self.options.clients:
                self.say(f"{name}: {clients} clients that never wait")
                seconds = min(10.0, self.options.seconds)
                closed = self.trace("mixed", self.capacity * 4, seconds, repeat)
                before = best_rate(self.runtime, self.bundle, self.works)
                rate = asyncio.run(saturate(running.target, closed, clients, seconds))
                bare = (before + best_rate(self.runtime, self.bundle, self.works)) / 2
                self.saturation.setdefault(name, {}).setdefault(str(clients), []).append(round(rate, 3))
                self.saturation_parts.setdefault(name, {}).setdefault(str(clients), []).append(round(rate / bare, 4))
            for trace, rates in self.plan().items():
                for part in rates:
                    self.say(f"{name}: {trace} at {part:g} of {self.capacity:.1f} per second")
                    arrivals = self.trace(trace, part * self.capacity, self.options.seconds, repeat)
                    self.open_loop(running, name, trace, part, arrivals)

    def plan(self) -> dict[Trace, list[float]]:
        """Rates by trace: the first trace at all of them."""
        first, *others = self.options.traces
        return {first: self.options.rates, **{trace: [self.options.at] for trace in others}}

    def trace(self, name: Trace, rate: float, seconds: float, repeat: int) -> list[Arrival]:
        return make_trace(name, rate, seconds, self.steps, seed=repeat, frames=self.frames)

    def started(self, name: str) -> Any:
        """A server on a port of its own."""
        self.port = next_free(self.port)
        cores = self.server_cores if self.server_cores != self.client_cores else ()
        return start(name, self.options.bundle, self.threads, self.port, keys=self.keys, cores=cores)

    def open_loop(self, running: Running, name: str, trace: Trace, part: float, arrivals: Sequence[Arrival]) -> None:
        target = running.target
        deadline = (lambda work: self.slo_ms[work]) if name == "ours, deadlines" else None
        before, client_cpu = served_outcomes(target.port) if target.ours else {}, time.process_time()
        with Watch(running) as watch:
            sent = asyncio.run(replay(target, arrivals, deadline_ms=deadline))
        seconds = max(self.options.seconds, watch.samples[-1].at - watch.samples[0].at)
        usage = {
            "server_cores_busy": round(watch.cpu_s / seconds, 3),
            "client_cores_busy": round((time.process_time() - client_cpu) / seconds, 3),
            "memory_mb": round(max(sample.rss_mb for sample in watch.samples), 1),
        }
        if target.ours:
            self.metrics_agree.append(settled(sent, before, target.port))
        self.sent.setdefault((trace, name, part), []).append(sent)
        self.runs.setdefault((trace, name, part), []).append(usage)

    def overload(self) -> None:
        """Ours at twice the capacity, between two calm times."""
        over_s = self.options.recovery
        calm_s = min(60.0, max(over_s / 4, min(over_s, 20.0)))
        self.say(f"ours: {over_s:g} s at {OVERLOAD:g} of {self.capacity:.1f} per second, {calm_s:g} s before and after")
        pieces = [(CALM, 0.0, calm_s), (OVERLOAD, calm_s, over_s), (CALM, calm_s + over_s, calm_s)]
        arrivals = [
            replace(arrival, at=begin + arrival.at)
            for number, (part, begin, seconds) in enumerate(pieces)
            for arrival in self.trace(self.options.traces[0], part * self.capacity, seconds, number)
        ]
        with self.started("ours") as running:
            solo_ms(running.target, self.works)  # warm
            before = served_outcomes(running.target.port)
            with Watch(running) as watch:
                begun = time.perf_counter()
                sent = asyncio.run(replay(running.target, arrivals))
            agreed = settled(sent, before, running.target.port)
        self.metrics_agree.append(agreed)
        compared, different = wrong_files(sent, self.runtime, self.bundle)
        self.recovered = {
            **recovery(sent, watch.samples, begun, calm_s, over_s),
            **{
                key: summarise(sent, 2 * calm_s + over_s, self.slo_ms)[key]
                for key in ("sent", "ok", "rejected", "failed")
            },
            "metrics_agree": agreed,
            "compared": compared,
            "different": different,
        }

    @property
    def slo_ms(self) -> dict[str, float]:
        return {work.work: SLO * min(alone[work.work] for alone in self.solo.values()) for work in self.works}

    def result(self) -> dict[str, Any]:
        options = self.options
        rows, compared, different = [], 0, 0
        for (trace, name, part), repeats in self.sent.items():
            for sent in repeats:
                checked, wrong = wrong_files(sent, self.runtime, self.bundle)
                compared, different = compared + checked, different + wrong
            usages = self.runs[trace, name, part]
            runs = [
                summarise(sent, options.seconds, self.slo_ms) | usage
                for sent, usage in zip(repeats, usages, strict=True)
            ]
            goodput = [run["goodput"] for run in runs]
            spread = {"goodput": median(goodput), "goodput_spread": [min(goodput), max(goodput)]}
            rows.append({"trace": trace, "server": name, "rate": part, **spread, "runs": runs})
        return {
            "bundle": self.bundle.manifest.name,
            "digest": self.bundle.digest,
            "runtime": self.runtime.capabilities.runtime,
            "traces": options.traces,
            "seconds": options.seconds,
            "repeats": options.repeats,
            "threads": self.threads,
            "processor": processor(),
            "cores": {"client": self.client_cores, "servers": self.server_cores},
            "load_average": os.getloadavg(),
            "command": " ".join(["python -m benchmarks.load", *sys.argv[1:]]),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("bentoml", "fastapi", "onnxruntime", "numpy", "uvicorn")},
            "revision": _revision(),
            "capacity_per_s": round(self.capacity, 3),
            "solo_ms": {name: {k: round(v, 2) for k, v in alone.items()} for name, alone in self.solo.items()},
            "slo_ms": {k: round(v, 2) for k, v in self.slo_ms.items()},
            "saturation_per_s": self.saturation,
            "saturation_parts": self.saturation_parts,
            "rows": rows,
            "compared": compared,
            "different": different,
            "metrics_agree": all(self.metrics_agree),
            "recovery": self.recovered,
        }

    @staticmethod
    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def settled(sent: Sequence[Sent], before: dict[str, float], port: int) -> bool:
    """Whether the server's counts agree with the clients' before long: it sees later than they do that they left."""
    end = time.monotonic() + SETTLE_S
    while not (agreed := agree(sent, before, served_outcomes(port))) and time.monotonic() < end:
        time.sleep(0.2)
    return agreed


def next_free(port: int) -> int:
    """The first port after this one that nobody has, connections of clients included."""
    for candidate in range(port + 1, 65_536):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            return candidate
    raise SystemExit(f"no port after {port} is free; give a lower --port")


def divide(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """Cores of the client and of the servers: the same ones where there are fewer than four."""
    return (list(cores[-1:]), list(cores[:-1])) if len(cores) >= 4 else (list(cores), list(cores))


def _revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Goodput and latency under load: our service against other policies.",
        epilog="example: python -m benchmarks.load bundles/scenes-sdxl --traces mixed burst --seconds 60 --repeats 3",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--traces", nargs="+", choices=TRACES, help="default: mixed; of a bundle of videos: video")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each trace; default: %(default)g")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.3, 0.6, 0.8, 1.0, 1.2],
        help="of the first trace, parts of capacity",
    )
    parser.add_argument("--at", type=float, default=0.8, help="rate of the other traces; default: %(default)g")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="of closed loops; default: 1 4 16")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, help="default: all")
    parser.add_argument("--recovery", type=float, default=0.0, help="seconds of an overload of ours; default: none")
    parser.add_argument("--threads", type=int, help="of one graph run; default: the servers' cores")
    parser.add_argument("--port", type=int, default=3100, help="the first of several; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.json")
    options = parser.parse_args(arguments)
    films = bool(Bundle.open(options.bundle).manifest.frames)
    options.traces = list(dict.fromkeys(options.traces or ["video" if films else "mixed"]))
    if films != (options.traces == ["video"]) or ("video" in options.traces and not films):
        kind, fits = ("videos", "video") if films else ("pictures", "any other trace")
        parser.error(f"--traces is {' '.join(options.traces)} and {options.bundle} makes {kind}; give {fits}")
    able = [name for name in SERVERS if not films or name not in ("naive", "adaptive")]
    options.servers = options.servers or able
    if missing := [name for name in options.servers if name not in able]:
        parser.error(f"--servers has {missing[0]}, which makes no videos; give some of {', '.join(able)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    run = Run(options)
    # Those that send deadlines come last: they need everybody's solo latency.
    for repeat in range(options.repeats):
        for name in sorted(options.servers, key=lambda name: name == "ours, deadlines"):
            run.server(name, repeat)
    if options.recovery:
        run.overload()
    for path in write_report(run.result(), options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
