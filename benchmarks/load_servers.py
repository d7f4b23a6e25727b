"""The servers of the load test, each in processes of its own, and what can be seen of them from outside.

ours                our service with its defaults
ours, deadlines     the same, and clients send twice the solo latency as deadline_ms, which only ours knows
batching, serial    other policies over the same runtime: see benchmarks.load_baselines
naive, adaptive     the model as a method of a BentoML service: see benchmarks.load_bentoml
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.load_client import Target
from benchmarks.load_traces import TENANTS

SERVERS = ("ours", "ours, deadlines", "batching", "serial", "naive", "adaptive")
KEYS = tuple(f"load-{k}" for k in range(len(TENANTS)))
READY_S, STOP_S = 300.0, 60.0
SAMPLE_S = 0.5


@dataclass(frozen=True)
class Running:
    target: Target
    process: subprocess.Popen[bytes]


@contextmanager
def start(
    server: str, bundle: Path, threads: int, port: int, *, keys: Sequence[str] = (), cores: Sequence[int] = ()
) -> Iterator[Running]:
    """One server, ready. keys: of its clients, for ours; cores: to run on, none: all."""
    ours = server.startswith("ours")
    with tempfile.TemporaryDirectory() as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LEAPFROG_")}
        environment |= {"BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True", "LEAPFROG_THREADS": str(threads)}
        environment |= {"LEAPFROG_BUNDLES": str(bundle.resolve()), "LEAPFROG_DATA": str(Path(home) / "data")}
        if ours and keys:
            # Places in the queue are shared by all keys, as in the other servers, which know no keys.
            environment |= {"LEAPFROG_API_KEYS": ",".join(keys), "LEAPFROG_MAX_KEY_ROWS": "64"}
        log = Path(home) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command(server, bundle, threads, port), env=environment, stdout=sink, stderr=sink
            )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        try:
            _wait_until_ready(port, process, log)
            yield Running(Target(port, tuple(keys) if ours else (), server == "adaptive", ours), process)
        finally:
            _stop(process)


def command(server: str, bundle: Path, threads: int, port: int) -> list[str]:
    bento = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
    if server.startswith("ours"):
        return bento
    if server in ("naive", "adaptive"):
        return [*bento, "--host", "127.0.0.1", f"benchmarks.load_bentoml:{server.title()}"]
    baseline = [sys.executable, "-m", "benchmarks.load_baselines", server, str(bundle)]
    return [*baseline, "--port", str(port), "--threads", str(threads)]


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"a server did not become ready in {READY_S:.0f} s; its log:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As one would in production; what is still there after STOP_S is ended by force."""
    processes = _tree(process.pid) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        for one in processes:
            if one.is_running():
                one.kill()
        process.wait()


class Sample(NamedTuple):
    """Of a server at one moment, seconds on time.perf_counter."""

    at: float
    rss_mb: float
    cpu_s: float
    waiting: int
    """Pictures in its queue; 0 for servers that do not tell."""


class Watch:
    """Looks at a server every SAMPLE_S, in a thread: memory and processor time of all its processes, and its queue."""

    def __init__(self, running: Running) -> None:
        self.samples: list[Sample] = []
        self._running, self._over = running, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """Processor seconds between the first and the last look."""
        return self.samples[-1].cpu_s - self.samples[0].cpu_s

    def _look(self) -> None:
        over = False
        while not over:
            over = self._over.wait(SAMPLE_S if self.samples else 0)
            rss, cpu = 0.0, 0.0
            for process in _tree(self._running.process.pid):
                with process.oneshot():
                    rss += process.memory_info().rss
                    cpu += sum(process.cpu_times()[:2])
            queued = waiting(self._running.target) if self._running.target.ours else 0
            self.samples.append(Sample(time.perf_counter(), rss / 2**20, cpu, queued))


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def waiting(target: Target) -> int:
    """Pictures in the queues of ours."""
    headers = {"authorization": f"Bearer {target.keys[0]}"} if target.keys else {}
    request = urllib.request.Request(f"http://127.0.0.1:{target.port}/v1/queue", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return sum(int(queue["waiting"]) for queue in json.load(answer)["data"])


def served_outcomes(port: int) -> dict[str, float]:
    """What the server counted, by outcome."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counts: Counter[str] = Counter()
    for line in lines:
        if line.startswith("leapfrog_requests_total{"):
            counts[line.partition('outcome="')[2].partition('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return dict(counts)
