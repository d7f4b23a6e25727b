"""A real ``bentoml serve`` in a process of its own, on the random-weight bundle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from distill.bundle import Bundle
from service.runtimes import OnnxRuntime

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 180.0


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    start_cpu_s: float | None
    """Processor seconds until ready; unlike the clock, it does not depend on what else the machine does."""

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def images(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=60)


def tree(pid: int) -> list[psutil.Process]:
    """The supervisor and its workers."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in tree(pid))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(bundles: Path, home: Path, *, ready: bool = True, **settings: object) -> Iterator[Server]:
    """Start ``bentoml serve`` and wait until it is ready, or (ready=False) has made up its mind that it is not."""
    home.mkdir()
    environment = {
        k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR" and not k.startswith("LEAPFROG_")
    }
    environment |= {f"LEAPFROG_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {"LEAPFROG_BUNDLES": str(bundles), "BENTOML_HOME": str(home)}
    environment.setdefault("LEAPFROG_DATA", str(home / "data"))
    port, log = free_port(), home / "log"
    command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=sink, stderr=sink)
    server = Server(f"http://127.0.0.1:{port}", process, log, None)
    try:
        _wait(server, ready)
        yield Server(server.url, process, log, cpu_seconds(process.pid))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _wait(server: Server, ready: bool) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            answer = server.get("/readyz")
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        if ready and answer.status_code == 200:
            return
        if not ready and answer.status_code == 503 and "being loaded" not in answer.text:
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not come up:\n{server.log.read_text()}")


@pytest.fixture(scope="session")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with default settings."""
    with serve(tiny_bundle.parent, tmp_path_factory.mktemp("server") / "home") as running:
        yield running


@pytest.fixture(scope="session")
def video_server(
    tiny_bundle: Path, tiny_video_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a model for pictures and one for videos."""
    bundles = tmp_path_factory.mktemp("both")
    for bundle in (tiny_bundle, tiny_video_bundle):
        (bundles / bundle.name).symlink_to(bundle)
    with serve(bundles, tmp_path_factory.mktemp("video-server") / "home", max_frames=21) as running:
        yield running


@pytest.fixture(scope="session")
def video_runtime(tiny_video_bundle: Path) -> OnnxRuntime:
    return OnnxRuntime(Bundle.open(tiny_video_bundle), threads=1, max_batch=4)


@pytest.fixture(scope="session")
def runtime(tiny_bundle: Path) -> OnnxRuntime:
    return OnnxRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=8)
