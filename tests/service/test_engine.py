"""The engine: rows of many requests in one batch, and what happens to them when things go wrong."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.bundle import Bundle
from service.engine import Engine
from service.rows import DeadlineExceeded, EngineClosed, Order, OutOfMemory, QueueFull
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
        self.memory = 64
        """Rows that fit into it."""
        self.who: list[int] = []
        """Which copy of this runtime computed each step."""
        super().__init__(bundle, threads=1, max_batch=8)

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        self.who.append(id(self))
        self.entered.set()
        assert self.go.wait(30), "nobody let the step go on"
        self.batches.append([float(t) for t in timestep])
        if self.poison is not None and (latents[:, 0, 0, 0] == np.float32(self.poison)).any():
            raise RuntimeError("poisoned row")
        if len(latents) > self.memory:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4711")
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

    def _start(sizes: tuple[int, ...] = (1, 2, 4, 8), **settings: object) -> Engine:
        """Batches of all ``sizes`` pay, whatever this machine measures."""
        engine = Engine("cpu", **{"max_queue": 64, **settings})  # type: ignore[arg-type]
        engines.append(engine)
        engine.add("tiny", watched, watched.manifest, [copy.copy(watched) for _ in range(engine.lanes)])
        steady(engine, sizes)
        watched.batches.clear()
        watched.who.clear()
        watched.entered.clear()
        return engine

    yield _start
    watched.go.set()
    for engine in engines:
        engine.close()
        assert not engine.alive


def steady(engine: Engine, sizes: tuple[int, ...]) -> None:
    """Fix the cost curve, so that no test depends on what this machine measures: a batch costs as much as one row."""
    key = engine._served["tiny"].keys[SIZE, 0]
    engine.budget.know(key, sizes, engine.lanes)
    for rows in sizes:
        engine.budget.observe(key, rows, 0.01)
        if engine.lanes > 1:
            engine.budget.observe(key, rows, 0.005 * rows, wide=True)
    engine.budget.observe = lambda key, rows, seconds, wide=False: None  # type: ignore[method-assign]


def order(seeds: Sequence[int], steps: int, prompt: str = PROMPT, **more: Any) -> Order:
    return Order("tiny", prompt, tuple(seeds), steps, SIZE, **more)


def texts_are_ready(engine: Engine) -> None:
    """Wait for the text thread, so that what may share a batch does not depend on how fast it is."""
    while True:
        with engine._wake:
            if all(job.ready for job in engine.scheduler):
                return
        time.sleep(0.002)


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
    futures = [engine.submit(order([seed], steps, prompt))[0] for prompt, seed, steps in wishes]
    texts_are_ready(engine)
    watched.go.set()
    pictures = [future.result(60) for future in futures]
    assert max(len(batch) for batch in watched.batches) > 1
    for (prompt, seed, steps), picture in zip(wishes, pictures, strict=True):
        alone = generate(watched, watched.manifest, [prompt], [seed], steps)[0]
        np.testing.assert_array_equal(picture.pixels, alone)


def test_pictures_made_in_lanes_equal_those_made_alone(start: Start, watched: Watched) -> None:
    engine = start(lanes=3)
    wishes = [(f"a {colour} cube", seed, 2 ** (seed % 4)) for seed, colour in enumerate(("red", "blue", "green") * 8)]
    futures = [engine.submit(order([seed], steps, prompt))[0] for prompt, seed, steps in wishes]
    pictures = [future.result(60) for future in futures]
    assert len(set(watched.who) - {id(watched)}) > 1, "several lanes computed"
    for (prompt, seed, steps), picture in zip(wishes, pictures, strict=True):
        alone = generate(watched, watched.manifest, [prompt], [seed], steps)[0]
        np.testing.assert_array_equal(picture.pixels, alone)
    assert engine.load() == (0, 0, 0.0)


def test_two_rows_are_computed_at_the_same_time_and_a_lone_one_on_all_cores(start: Start, watched: Watched) -> None:
    engine = start(lanes=2)
    assert engine.lane_count("tiny") == 2
    engine.submit(order([1], 4))[0].result(60)
    assert watched.who == [id(watched)] * 4
    watched.who.clear()
    watched.go.clear()
    both = engine.submit(order([1, 2], 2))
    end = time.monotonic() + 30
    while len(watched.who) < 2 and time.monotonic() < end:
        time.sleep(0.002)
    assert len(watched.who) == 2, "both are in their first step"
    watched.go.set()
    assert [future.result(60).largest_batch for future in both] == [1, 1]


def test_a_row_that_fails_in_a_lane_fails_alone(start: Start, watched: Watched) -> None:
    engine = start(lanes=2)
    watched.poison = first_latent(1)
    for lane in engine._served["tiny"].lanes:
        lane.poison = watched.poison  # type: ignore[attr-defined]
    futures = engine.submit(order(range(8), 2))
    for seed, future in enumerate(futures):
        if seed == 1:
            with pytest.raises(RuntimeError, match="poisoned row"):
                future.result(60)
        else:
            assert future.result(60).seed == seed
    assert engine.alive


def test_rows_leave_lanes_when_they_are_given_up_and_closing_finishes_the_rest(start: Start, watched: Watched) -> None:
    engine = start(lanes=2)
    watched.go.clear()
    futures = engine.submit(order(range(6), 4))
    assert watched.entered.wait(30)
    assert futures[0].cancel() and futures[5].cancel()
    threading.Timer(0.2, watched.go.set).start()
    engine.close()
    assert [future.result(0).seed for future in futures[1:5]] == [1, 2, 3, 4]
    assert not engine.alive


def test_lanes_that_change_a_bit_are_not_used(watched: Watched) -> None:
    class Inexact(Watched):
        def step(self, *arguments: Any) -> tuple[Floats, Floats]:
            advanced, x0 = super().step(*arguments)
            return np.nextafter(advanced, np.float32(9)), x0

    lanes = [copy.copy(watched) for _ in range(2)]
    for lane in lanes:
        lane.__class__ = Inexact
    engine = Engine("cpu", max_queue=8, lanes=2)
    engine.add("tiny", watched, watched.manifest, lanes)
    assert engine.lane_count("tiny") == 1
    futures = engine.submit(order([3, 4], 2))
    for seed, future in zip((3, 4), futures, strict=True):
        alone = generate(watched, watched.manifest, [PROMPT], [seed], 2)[0]
        np.testing.assert_array_equal(future.result(60).pixels, alone)
    engine.close()


def test_rows_at_different_steps_share_a_batch_and_short_ones_leave_early(start: Start, watched: Watched) -> None:
    engine = start()
    watched.go.clear()
    long = engine.submit(order([1], 8))[0]
    assert watched.entered.wait(30)
    short = engine.submit(order([2], 1))[0]
    done: list[str] = []
    long.add_done_callback(lambda _: done.append("long"))
    short.add_done_callback(lambda _: done.append("short"))
    texts_are_ready(engine)
    watched.go.set()
    long.result(60)
    assert done == ["short", "long"]
    assert any(len(set(batch)) == 2 for batch in watched.batches)
    assert short.result(0).largest_batch == 2


def test_one_request_becomes_one_row_per_seed_in_order(start: Start) -> None:
    pictures = [future.result(60) for future in start().submit(order([5, 6, 7], 2))]
    assert [picture.seed for picture in pictures] == [5, 6, 7]
    assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)


def test_no_batch_is_larger_than_allowed(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1, 2))
    watched.go.clear()
    futures = engine.submit(order(range(10), 2))
    texts_are_ready(engine)
    watched.go.set()
    for future in futures:
        future.result(60)
    assert max(len(batch) for batch in watched.batches) == 2


def test_full_queue_refuses_a_whole_request_and_says_when_to_retry(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1,), max_queue=3)
    watched.go.clear()
    running = engine.submit(order([0], 8))
    assert watched.entered.wait(30)
    waiting = engine.submit(order([1, 2], 8))
    with pytest.raises(QueueFull) as refused:
        engine.submit(order([3, 4], 1))
    assert refused.value.waiting == 2
    assert refused.value.retry_after_s > 0
    last = engine.submit(order([5], 1))
    texts_are_ready(engine)
    watched.go.set()
    assert [future.result(60).seed for future in [*running, *waiting, *last]] == [0, 1, 2, 5]


def test_cancelled_rows_leave_at_the_next_step_and_free_their_place(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1,), max_queue=1)
    watched.go.clear()
    running = engine.submit(order([0], 8))[0]
    assert watched.entered.wait(30)
    waiting = engine.submit(order([1], 8))[0]
    assert running.cancel()
    assert waiting.cancel()
    after = engine.submit(order([2], 1))[0]
    texts_are_ready(engine)
    watched.go.set()
    assert after.result(60).seed == 2
    assert len(watched.batches) == 2, "one step of the cancelled row, one of the row after it"
    with pytest.raises(CancelledError):
        running.result(0)


def test_a_failing_row_fails_alone(start: Start, watched: Watched) -> None:
    engine = start()
    watched.poison = first_latent(1)
    futures = engine.submit(order([0, 1, 2], 4))
    with pytest.raises(RuntimeError, match="poisoned row"):
        futures[1].result(60)
    for seed in (0, 2):
        expected = generate(watched, watched.manifest, [PROMPT], [seed], 4)[0]
        np.testing.assert_array_equal(futures[seed].result(60).pixels, expected)
    assert engine.alive


def test_latents_that_are_not_finite_fail_instead_of_becoming_a_picture(start: Start, watched: Watched) -> None:
    engine = start()
    watched.nan = first_latent(1)
    futures = engine.submit(order([0, 1], 1))
    with pytest.raises(FloatingPointError, match="seed 1 are not finite"):
        futures[1].result(60)
    assert futures[0].result(60).seed == 0


def test_closing_finishes_what_is_queued_and_refuses_the_rest(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1,))
    watched.go.clear()
    futures = engine.submit(order([0, 1, 2], 2))
    texts_are_ready(engine)
    threading.Timer(0.2, watched.go.set).start()
    engine.close()
    assert [future.result(0).seed for future in futures] == [0, 1, 2]
    with pytest.raises(EngineClosed):
        engine.submit(order([3], 1))


def test_the_prompt_of_several_rows_is_encoded_once(
    start: Start, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    encoded: list[str] = []
    original = watched.encode_text
    monkeypatch.setattr(watched, "encode_text", lambda prompts: encoded.extend(prompts) or original(prompts))
    for future in engine.submit(order([0, 1, 2], 1)):
        future.result(60)
    engine.submit(order([0], 1, "a blue sphere"))[0].result(60)
    assert encoded == [PROMPT, "a blue sphere"]
    once_more = engine.submit(order([0], 1, cache=False))[0].result(60)
    assert (encoded[2:], once_more.prompt_cache) == ([PROMPT], "off")
    assert engine.submit(order([0], 1))[0].result(60).prompt_cache == "hit"


def test_stage_times_are_measured(start: Start) -> None:
    picture = start().submit(order([0], 4))[0].result(60)
    for value in (picture.queue_ms, picture.encode_text_ms, picture.denoise_ms, picture.decode_ms):
        assert value > 0


def test_the_engine_watches_what_steps_and_decoding_cost(watched: Watched) -> None:
    engine = Engine("cpu", max_queue=8)
    engine.add("tiny", watched, watched.manifest)
    key = engine._served["tiny"].keys[SIZE, 0]
    assert set(engine.budget.curve(key)) == set(watched.capabilities.batch_sizes), "measured before the first request"
    before = engine.budget.step_s(key, 1)
    engine.submit(order([0], 8))[0].result(60)
    assert engine.budget.step_s(key, 1) != before
    assert engine.budget.decode_s(key) > 0
    assert engine.budget.text_s("tiny") > 0
    assert engine.load() == (0, 0, 0.0)
    engine.close()


def test_memory_that_runs_out_halves_the_batch_and_loses_no_picture(start: Start, watched: Watched) -> None:
    engine = start()
    watched.memory = 2
    watched.go.clear()
    futures = engine.submit(order(range(4), 2))
    texts_are_ready(engine)
    watched.go.set()
    for seed, future in enumerate(futures):
        expected = generate(watched, watched.manifest, [PROMPT], [seed], 2)[0]
        np.testing.assert_array_equal(future.result(60).pixels, expected)
    assert engine.budget.sizes(engine._served["tiny"].keys[SIZE, 0]) == (1, 2)


def test_memory_that_runs_out_again_fails_the_rows_and_nothing_else(start: Start, watched: Watched) -> None:
    engine = start()
    watched.memory = 0
    for future in engine.submit(order(range(4), 1)):
        with pytest.raises(OutOfMemory, match="Failed to allocate"):
            future.result(60)
    watched.memory = 8
    assert engine.submit(order([0], 1))[0].result(60).seed == 0


def test_deadlines_that_cannot_be_met_are_refused_at_once(start: Start) -> None:
    engine = start()
    with pytest.raises(DeadlineExceeded) as refused:
        engine.submit(order([0], 8, deadline_s=0.02))
    assert refused.value.needed_s > 0.08
    assert engine.load() == (0, 0, 0.0)
    assert engine.submit(order([0], 8, deadline_s=60))[0].result(60).seed == 0


def test_a_row_past_its_deadline_leaves_at_the_next_step(watched: Watched) -> None:
    now = [0.0]
    engine = Engine("cpu", max_queue=8, clock=lambda: now[0])
    engine.add("tiny", watched, watched.manifest)
    steady(engine, (1,))
    watched.batches.clear()
    watched.entered.clear()
    watched.go.clear()
    late = engine.submit(order([0], 8, deadline_s=1.0))[0]
    assert watched.entered.wait(30)
    now[0] = 2.0
    texts_are_ready(engine)
    watched.go.set()
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert len(watched.batches) == 1
    engine.close()


def test_an_owner_beyond_its_limit_is_refused_while_others_are_not(start: Start, watched: Watched) -> None:
    engine = start(max_owner_rows=2)
    watched.go.clear()
    engine.submit(order([0, 1], 8, owner="a"))
    with pytest.raises(QueueFull) as refused:
        engine.submit(order([2], 8, owner="a"))
    assert refused.value.of_owner
    engine.submit(order([2], 8, owner="b"))
    texts_are_ready(engine)
    watched.go.set()


def test_more_work_than_seconds_allow_is_refused(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1,), max_queue_s=0.1)
    watched.go.clear()
    engine.submit(order(range(4), 8))
    with pytest.raises(QueueFull) as refused:
        engine.submit(order([9], 8))
    assert refused.value.retry_after_s == pytest.approx(4 * 8 * 0.01 - 0.1)
    texts_are_ready(engine)
    watched.go.set()


def test_each_step_but_the_last_shows_its_estimate_of_the_picture(start: Start, watched: Watched) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    on_step = lambda index, done, x0: seen.append((index, done, x0.shape))  # noqa: E731
    for future in start().submit(order([3, 4], 4, on_step=on_step)):
        future.result(60)
    assert sorted(seen) == [(index, done, (4, 16, 16)) for index in (0, 1) for done in (1, 2, 3)]


def test_every_stage_of_a_row_is_told_when_and_with_how_many_it_was(start: Start, watched: Watched) -> None:
    engine, told = start(), list[tuple[int, str, float, float, int]]()
    watched.go.clear()
    begun = time.perf_counter()
    futures = engine.submit(order([3, 4], 2, on_stage=lambda *stage: told.append(stage)))
    texts_are_ready(engine)
    watched.go.set()
    pictures = [future.result(60) for future in futures]
    ended = time.perf_counter()
    for index, picture in enumerate(pictures):
        mine = {name: (start, end) for i, name, start, end, _ in told if i == index}
        assert [name for i, name, *_ in told if i == index] == [
            *("encode_text", "queue", "denoise", "denoise", "decode")
        ]
        spent = {name: sum(e - s for i, n, s, e, _ in told if (i, n) == (index, name)) * 1e3 for name in mine}
        assert spent["encode_text"] == pytest.approx(picture.encode_text_ms)
        assert spent["denoise"] == pytest.approx(picture.denoise_ms)
        assert spent["decode"] == pytest.approx(picture.decode_ms)
        assert begun <= mine["queue"][0] <= mine["encode_text"][0] <= mine["encode_text"][1] <= mine["queue"][1]
        assert mine["queue"][1] <= mine["denoise"][0] <= mine["denoise"][1] <= mine["decode"][0]
        assert mine["decode"][1] <= ended
        assert max(rows for i, name, *_, rows in told if (i, name) == (index, "denoise")) == picture.largest_batch


def test_text_and_decoding_of_other_rows_go_on_while_a_step_runs(
    start: Start, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(sizes=(1,))
    first = engine.submit(order([0], 1))[0].result(60)
    assert first.seed == 0
    decoding, let_go = threading.Event(), threading.Event()
    original = watched.decode

    def held(latents: Floats) -> Any:
        decoding.set()
        assert let_go.wait(30)
        return original(latents)

    monkeypatch.setattr(watched, "decode", held)
    done = engine.submit(order([1], 1))[0]
    assert decoding.wait(30)
    far = threading.Event()
    last_but_one = lambda index, steps_done, x0: far.set() if steps_done == 3 else None  # noqa: E731
    later = engine.submit(order([2], 4, "a blue sphere", on_step=last_but_one))[0]
    assert far.wait(30), "text and steps of the second waited for the pixels of the first"
    assert not done.done()
    let_go.set()
    assert [done.result(60).seed, later.result(60).seed] == [1, 2]


def test_a_forecast_counts_what_is_ahead(start: Start, watched: Watched) -> None:
    engine = start(sizes=(1,), max_queue=8)
    idle = engine.forecast(order([0], 4))
    assert idle.position == 0
    watched.go.clear()
    futures = engine.submit(order([0, 1], 4))
    assert watched.entered.wait(30)
    ahead = engine.forecast(order([2], 4))
    assert ahead.seconds > idle.seconds
    assert engine.outlook(futures[:1]).seconds <= engine.outlook(futures).seconds
    with pytest.raises(QueueFull):
        engine.forecast(order(range(10), 4))
    texts_are_ready(engine)
    watched.go.set()
    for future in futures:
        future.result(60)
    assert engine.outlook(futures) == (0.0, 0)


def test_all_cores_may_change_bits_in_batches_where_lanes_do_not(watched: Watched) -> None:
    lanes = [copy.copy(watched) for _ in range(2)]
    able = watched.capabilities
    watched.capabilities = replace(
        able, batch_sizes=(1,), step_ms=able.step_ms[:1], loose_sizes=able.batch_sizes, loose_ms=able.step_ms
    )
    engine = Engine("cpu", max_queue=8, lanes=2)
    engine.add("tiny", watched, watched.manifest, lanes)
    assert engine.submit(order([3], 2, exact=False))[0].result(60).seed == 3
    engine.close()
