"""What the service adds to the bare runtime: one client, one picture or clip at a time, both in one run.

    python -m benchmarks.latency bundles/scenes-sdxl --requests 100
    python -m benchmarks.latency bundles/scenes-wan --requests 30        # clips: the first preview as well

The two take turns, one picture each, with the same threads, prompts, seeds and steps, so that a machine whose speed
changes changes both; what the service adds is the median over pairs. The bare runtime is in this process. The result is
printed and written beside this file as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np

from distill.bundle import Bundle
from service.runtimes import generate, open_runtime

PROMPT = "a large red metal sphere left of a small blue rubber sphere"
_READY_TIMEOUT_S = 120.0
WARM = 3
"""Pairs that come first and are not counted."""
_COLD = """
import sys
from pathlib import Path
from distill.bundle import Bundle
from service.runtimes import generate, open_runtime
folder, threads, prompt, steps = sys.argv[1:]
bundle = Bundle.open(Path(folder))
runtime = open_runtime(bundle, threads=int(threads), max_batch=1)
generate(runtime, bundle.manifest, [prompt], seeds=[0], steps=int(steps))
"""


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, with the number of samples."""
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    return {"n": len(milliseconds), "p50_ms": round(p50, 2), "p90_ms": round(p90, 2), "p99_ms": round(p99, 2)}


def time_cold_start(bundle: Bundle, steps: int, threads: int, count: int = 3) -> float:
    """Median seconds of a process that opens the bundle, checks its hashes, loads its engines and makes one thing."""
    words = [str(bundle.path), str(threads), PROMPT, str(steps)]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", _COLD, *words], check=True)
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)), 2)


def time_both(bundle: Bundle, steps: int, count: int, threads: int) -> dict[str, Any]:
    """The floor and the service in turns.

    runtime: text, steps and decoding of one picture or clip, without HTTP and without PNG or MP4. service: a request
    on a connection that stays open until its PNG or MP4 is here; each prompt is new, so nothing is cached.
    """
    runtime = open_runtime(bundle, threads=threads, max_batch=1)
    ask = _clip if bundle.manifest.task == "text-to-video" else _picture
    bare, wholes, previews = [], [], []
    with _serving(bundle) as (port, ready_s), closing(HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        for seed in range(count + WARM):
            start = time.perf_counter()
            generate(runtime, bundle.manifest, [PROMPT], seeds=[seed], steps=steps)
            bare.append((time.perf_counter() - start) * 1e3)
            whole, preview = ask(client, bundle.manifest.name, steps, seed)
            wholes.append(whole)
            previews += [] if preview is None else [preview]
    bare, wholes, previews = bare[WARM:], wholes[WARM:], previews[WARM:]
    previewed = {"first_preview": quantiles(previews)} if previews else {}
    return {
        "runtime": quantiles(bare),
        "service": quantiles(wholes) | {"ready_s": round(ready_s, 2)} | previewed,
        **paired(bare, wholes),
    }


def paired(bare: list[float], service: list[float]) -> dict[str, float]:
    """Medians over pairs of milliseconds of what the service takes over the bare runtime."""
    ratio = np.median(np.divide(service, bare))
    return {
        "ratio_p50": round(float(ratio), 3),
        "overhead_p50_ms": round(float(np.median(np.subtract(service, bare))), 2),
    }


@contextmanager
def _serving(bundle: Bundle) -> Iterator[tuple[int, float]]:
    """The service's port, and the seconds until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {
            "LEAPFROG_BUNDLES": str(bundle.path.resolve()),
            "BENTOML_HOME": home,
            "LEAPFROG_DATA": home,
            "BENTOML_DO_NOT_TRACK": "True",
        }
        command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)]
        started = time.perf_counter()
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}")
            yield port, time.perf_counter() - started
        finally:
            server.terminate()
            server.wait(30)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise SystemExit(
        f"the service was not ready after {_READY_TIMEOUT_S:.0f} s; start bentoml serve by hand to see why"
    )


def _picture(client: HTTPConnection, model: str, steps: int, seed: int) -> tuple[float, None]:
    """Milliseconds until a picture is here."""
    start = time.perf_counter()
    json.load(_ask(client, "POST", "/v1/images/generations", _wish(model, steps, seed)))
    return (time.perf_counter() - start) * 1e3, None


def _clip(client: HTTPConnection, model: str, steps: int, seed: int) -> tuple[float, float]:
    """Milliseconds until a job's clip is here, and until its first preview was."""
    start, preview = time.perf_counter(), float("nan")
    job = f"/v1/videos/{json.load(_ask(client, 'POST', '/v1/videos', _wish(model, steps, seed)))['id']}"
    for line in _ask(client, "GET", f"{job}/events"):
        if line.startswith(b"event: video.preview") and np.isnan(preview):
            preview = (time.perf_counter() - start) * 1e3
    _ask(client, "GET", f"{job}/content").read()
    return (time.perf_counter() - start) * 1e3, preview


def _wish(model: str, steps: int, seed: int) -> str:
    return json.dumps({"model": model, "prompt": f"{PROMPT} {seed}", "seed": seed, "steps": steps})


def _ask(client: HTTPConnection, method: str, path: str, body: str | None = None) -> HTTPResponse:
    """On the connection of the request before, as OpenAI's client does."""
    client.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = client.getresponse()
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise SystemExit(f"the service answered {response.status}: {response.read()[:500].decode()}")
    return response


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description="Latency of the service against the bare runtime, in one run.",
        epilog="example: python -m benchmarks.latency bundles/scenes-sdxl --steps 4 --requests 100",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--out", type=Path, help="default: results/latency-BUNDLE.json beside this file")
    options = parser.parse_args(arguments)
    bundle, threads = Bundle.open(options.bundle), os.cpu_count() or 1
    out: Path = options.out or Path(__file__).parent / "results" / f"latency-{bundle.manifest.name}.json"
    result: dict[str, Any] = {
        "bundle": bundle.manifest.name,
        "digest": bundle.digest,
        "steps": options.steps,
        "threads": threads,
        "processor": processor(),
        "cold_start_s": time_cold_start(bundle, options.steps, threads),
        **time_both(bundle, options.steps, options.requests, threads),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"wrote {out}")


def processor() -> str:
    """The processor's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
