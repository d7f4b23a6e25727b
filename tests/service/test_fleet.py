"""Replicas: rows go where there is least to do, bytes do not depend on where, and it is still one engine to callers."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from distill.bundle import Bundle
from service.engine import Engine
from service.fleet import Fleet
from service.rows import DeadlineExceeded, EngineClosed, Order, QueueFull
from service.runtimes import Conditioning, OnnxRuntime, generate
from service.runtimes.base import Floats
from service.settings import Settings
from tests.service.conftest import Server, serve

PROMPT, SIZE = "a red cube", (64, 64)


class Held(OnnxRuntime):
    """The real runtime; a step waits while ``go`` is not set."""

    def __init__(self, bundle: Bundle) -> None:
        self.go, self.entered, self.rows = threading.Event(), threading.Event(), 0
        self.go.set()
        super().__init__(bundle, threads=1, max_batch=1)

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        self.entered.set()
        assert self.go.wait(30), "nobody let the step go on"
        self.rows += len(latents)
        return super().step(latents, timestep, coefficients, noise, conditioning)


@pytest.fixture(scope="module")
def runtimes(tiny_bundle: Path) -> list[Held]:
    return [Held(Bundle.open(tiny_bundle)) for _ in range(2)]


@pytest.fixture
def fleet(runtimes: list[Held]) -> Iterator[Fleet]:
    made = Fleet("cpu", [Engine(f"cpu:{i}", max_queue=2) for i in range(2)])
    made.add("tiny", runtimes, runtimes[0].manifest)
    for runtime in runtimes:
        runtime.rows = 0
        runtime.entered.clear()
    yield made
    for runtime in runtimes:
        runtime.go.set()
    made.close()
    assert not made.alive


def order(*seeds: int, steps: int = 2, **more: Any) -> Order:
    return Order("tiny", PROMPT, seeds, steps, SIZE, **more)


def test_pictures_of_one_request_are_made_side_by_side(fleet: Fleet, runtimes: list[Held]) -> None:
    told: list[int] = []
    stages: list[tuple[int, str]] = []
    on_stage = lambda index, stage, *_: stages.append((index, stage))  # noqa: E731
    both = order(1, 2, on_begin=told.append, on_stage=on_stage)
    pictures = [future.result(60) for future in fleet.submit(both)]
    assert [runtime.rows for runtime in runtimes] == [2, 2]
    assert sorted(told) == [0, 1], "callbacks tell the index in the whole request"
    for index in (0, 1):
        mine = [stage for i, stage in stages if i == index]
        assert mine == ["encode_text", "queue", "denoise", "denoise", "decode"]
    for seed, picture in zip((1, 2), pictures, strict=True):
        assert picture.seed == seed
        np.testing.assert_array_equal(
            picture.pixels, generate(runtimes[0], runtimes[0].manifest, [PROMPT], [seed], 2)[0]
        )


def test_a_busy_replica_is_passed_over(fleet: Fleet, runtimes: list[Held]) -> None:
    busy, free = runtimes
    busy.go.clear()
    held = fleet.submit(order(1, steps=8))
    assert busy.entered.wait(30)
    for seed in range(2, 6):
        fleet.submit(order(seed))[0].result(60)
    assert (busy.rows, free.rows) == (0, 8)
    assert fleet.outlook(held).seconds > 0
    busy.go.set()
    assert held[0].result(60).seed == 1
    assert fleet.outlook(held) == (0.0, 0)


def test_all_rows_of_a_request_are_queued_or_none(fleet: Fleet, runtimes: list[Held]) -> None:
    for runtime in runtimes:
        runtime.go.clear()
    running = fleet.submit(order(1, 2, steps=8))
    for runtime in runtimes:
        assert runtime.entered.wait(30)
    waiting = fleet.submit(order(3, 4, 5))
    with pytest.raises(QueueFull):
        fleet.submit(order(6, 7, 8))
    with pytest.raises(QueueFull):
        fleet.forecast(order(6, 7, 8, 9))
    last = fleet.submit(order(10))
    for runtime in runtimes:
        runtime.go.set()
    assert [future.result(60).seed for future in [*running, *waiting, *last]] == [1, 2, 3, 4, 5, 10]


def test_deadlines_and_the_end_are_told_as_by_one_engine(fleet: Fleet) -> None:
    with pytest.raises(DeadlineExceeded):
        fleet.submit(order(1, deadline_s=1e-9))
    futures = fleet.submit(order(1, 2))
    assert all(fleet.holds(future) or future.done() for future in futures)
    fleet.close()
    assert [future.result(0).seed for future in futures] == [1, 2]
    with pytest.raises(EngineClosed):
        fleet.submit(order(3))


def test_cores_are_shared_unless_threads_are_set() -> None:
    assert Settings(replicas=64).threads_each == 1
    assert Settings(replicas=2, threads=3).threads_each == 3


@pytest.fixture(scope="module")
def replicated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_bundle, tmp_path_factory.mktemp("replicas") / "home", replicas=2) as running:
        yield running


def test_two_replicas_give_the_bytes_of_one(server: Server, replicated: Server) -> None:
    def ask(seed: int) -> bytes:
        answer = replicated.images(prompt=PROMPT, seed=seed, steps=4, cache=False)
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, [seed for seed in range(4) for _ in range(3)]))
    for seed in range(4):
        alone = base64.b64decode(server.images(prompt=PROMPT, seed=seed, steps=4).json()["data"][0]["b64_json"])
        assert found[3 * seed : 3 * seed + 3] == [alone] * 3
    answer = replicated.images(prompt=PROMPT, seed=0, n=4, steps=1, cache=False).json()
    assert [item["seed"] for item in answer["data"]] == [0, 1, 2, 3]
    [queue] = replicated.get("/v1/queue").json()["data"]
    assert (queue["device"], queue["replicas"], queue["waiting"]) == ("cpu", 2, 0)
    labels = {line.split('device="')[1].split('"')[0] for line in lines(replicated, "leapfrog_running_rows{")}
    assert labels == {"cpu:0", "cpu:1"}
    counted = lines(replicated, "leapfrog_images_total{")
    assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 16
    assert httpx.get(f"{replicated.url}/readyz").status_code == 200


def lines(server: Server, start: str) -> list[str]:
    return [line for line in server.get("/metrics").text.splitlines() if line.startswith(start)]
