"""The engine: rows of many requests in one batch, and what happens to them when things go wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from distill.bundle import Bundle
from service.engine import Engine, EngineClosed, QueueFull
from service.runtimes import Conditioning, OnnxRuntime, generate
from service.runtimes.base import Floats

SIZE = (64, 64)
PROMPT = "a red cube"
Start = Callable[..., Engine]


class Watched(OnnxRuntime):
    """The real runtime that records the rows of each step, can be held before one, and can be told to fail."""

    def __init__(self, bundle: Bundle) -> None:
        self.batches: list[list[float]] = []
        self.go = threading.Event()
        self.entered = threading.Event()
        self.go.set()
        self.poison: float | None = None
        self.nan: float | None = None
        super().__init__(bundle, threads=1, max_batch=8)

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        self.entered.set()
        assert self.go.wait(30), "nobody let the step go on"
        self.batches.append([float(t) for t in timestep])
        if self.poison is not None and (latents[:, 0, 0, 0] == np.float32(self.poison)).any():
            raise RuntimeError("poisoned row")
        advanced, x0 = super().step(latents, timestep, coefficients, noise, conditioning)
        if self.nan is not None:
            advanced[latents[:, 0, 0, 0] == np.float32(self.nan)] = np.nan
        return advanced, x0


@pytest.fixture
def watched(tiny_bundle: Path) -> Watched:
    return Watched(Bundle.open(tiny_bundle))


@pytest.fixture
def start(watched: Watched) -> Iterator[Start]:
    engines: list[Engine] = []

    def _start(max_batch: int = 8, max_queue: int = 64) -> Engine:
        engines.append(Engine("tiny", watched, watched.manifest, max_batch=max_batch, max_queue=max_queue))
        return engines[-1]

    yield _start
    watched.go.set()
    for engine in engines:
        engine.close()
        assert not engine.alive


def first_latent(seed: int) -> float:
    from distill.sampling import noise

    return float(noise(seed, 0, (4, 16, 16))[0, 0, 0, 0])


def test_pictures_equal_those_made_alone_whatever_they_are_batched_with(start: Start, watched: Watched) -> None:
    engine = start()
    watched.go.clear()
    wishes = [
        (f"a {colour} cube", seed, steps)
        for seed, colour in enumerate(("red", "blue", "green"))
        for steps in (1, 2, 4, 8)
    ]
    futures = [engine.submit(prompt, [seed], steps, SIZE, "t")[0] for prompt, seed, steps in wishes]
    watched.go.set()
    pictures = [future.result(60) for future in futures]
    assert max(len(batch) for batch in watched.batches) > 1
    for (prompt, seed, steps), picture in zip(wishes, pictures, strict=True):
        alone = generate(watched, watched.manifest, [prompt], [seed], steps)[0]
        np.testing.assert_array_equal(picture.pixels, alone)


def test_rows_at_different_steps_share_a_batch_and_short_ones_leave_early(start: Start, watched: Watched) -> None:
    engine = start()
    watched.go.clear()
    long = engine.submit(PROMPT, [1], 8, SIZE, "t")[0]
    assert watched.entered.wait(30)
    short = engine.submit(PROMPT, [2], 1, SIZE, "t")[0]
    done: list[str] = []
    long.add_done_callback(lambda _: done.append("long"))
    short.add_done_callback(lambda _: done.append("short"))
    watched.go.set()
    long.result(60)
    assert done == ["short", "long"]
    assert any(len(set(batch)) == 2 for batch in watched.batches)
    assert short.result(0).largest_batch == 2


def test_one_request_becomes_one_row_per_seed_in_order(start: Start) -> None:
    pictures = [future.result(60) for future in start().submit(PROMPT, [5, 6, 7], 2, SIZE, "t")]
    assert [picture.seed for picture in pictures] == [5, 6, 7]
    assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)


def test_no_batch_is_larger_than_allowed(start: Start, watched: Watched) -> None:
    engine = start(max_batch=3)
    for future in engine.submit(PROMPT, list(range(10)), 2, SIZE, "t"):
        future.result(60)
    assert max(len(batch) for batch in watched.batches) == 3


def test_full_queue_refuses_a_whole_request_and_says_when_to_retry(start: Start, watched: Watched) -> None:
    engine = start(max_batch=1, max_queue=3)
    watched.go.clear()
    running = engine.submit(PROMPT, [0], 8, SIZE, "t")
    assert watched.entered.wait(30)
    waiting = engine.submit(PROMPT, [1, 2], 8, SIZE, "t")
    with pytest.raises(QueueFull) as refused:
        engine.submit(PROMPT, [3, 4], 1, SIZE, "t")
    assert refused.value.waiting == 2
    assert refused.value.retry_after_s > 0
    last = engine.submit(PROMPT, [5], 1, SIZE, "t")
    watched.go.set()
    assert [future.result(60).seed for future in [*running, *waiting, *last]] == [0, 1, 2, 5]


def test_cancelled_rows_leave_at_the_next_step_and_free_their_place(start: Start, watched: Watched) -> None:
    engine = start(max_batch=1, max_queue=1)
    watched.go.clear()
    running = engine.submit(PROMPT, [0], 8, SIZE, "t")[0]
    assert watched.entered.wait(30)
    waiting = engine.submit(PROMPT, [1], 8, SIZE, "t")[0]
    assert running.cancel()
    assert waiting.cancel()
    after = engine.submit(PROMPT, [2], 1, SIZE, "t")[0]
    watched.go.set()
    assert after.result(60).seed == 2
    assert len(watched.batches) == 2, "one step of the cancelled row, one of the row after it"
    with pytest.raises(CancelledError):
        running.result(0)


def test_a_failing_row_fails_alone(start: Start, watched: Watched) -> None:
    engine = start()
    watched.poison = first_latent(1)
    futures = engine.submit(PROMPT, [0, 1, 2], 4, SIZE, "t")
    with pytest.raises(RuntimeError, match="poisoned row"):
        futures[1].result(60)
    for seed in (0, 2):
        expected = generate(watched, watched.manifest, [PROMPT], [seed], 4)[0]
        np.testing.assert_array_equal(futures[seed].result(60).pixels, expected)
    assert engine.alive


def test_latents_that_are_not_finite_fail_instead_of_becoming_a_picture(start: Start, watched: Watched) -> None:
    engine = start()
    watched.nan = first_latent(1)
    futures = engine.submit(PROMPT, [0, 1], 1, SIZE, "t")
    with pytest.raises(FloatingPointError, match="seed 1 are not finite"):
        futures[1].result(60)
    assert futures[0].result(60).seed == 0


def test_closing_finishes_what_is_queued_and_refuses_the_rest(start: Start, watched: Watched) -> None:
    engine = start(max_batch=1)
    watched.go.clear()
    futures = engine.submit(PROMPT, [0, 1, 2], 2, SIZE, "t")
    threading.Timer(0.2, watched.go.set).start()
    engine.close()
    assert [future.result(0).seed for future in futures] == [0, 1, 2]
    with pytest.raises(EngineClosed):
        engine.submit(PROMPT, [3], 1, SIZE, "t")


def test_the_prompt_of_several_rows_is_encoded_once(
    start: Start, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = watched.encode_text
    monkeypatch.setattr(watched, "encode_text", lambda prompts: encoded.extend(prompts) or original(prompts))
    engine = start()
    for future in engine.submit(PROMPT, [0, 1, 2], 1, SIZE, "t"):
        future.result(60)
    engine.submit("a blue sphere", [0], 1, SIZE, "t")[0].result(60)
    assert encoded == [PROMPT, "a blue sphere"]


def test_stage_times_are_measured(start: Start) -> None:
    picture = start().submit(PROMPT, [0], 4, SIZE, "t")[0].result(60)
    for value in (picture.queue_ms, picture.encode_text_ms, picture.denoise_ms, picture.decode_ms):
        assert value > 0
