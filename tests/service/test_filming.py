"""Rows that are clips: the same frames alone and in a batch, compressed as they come, given up at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from distill.bundle import Bundle
from service.clips import Clip
from service.engine import Engine
from service.filming import SLOTS, Filming
from service.registry import Model
from service.rows import Order
from service.runtimes import OnnxRuntime, generate
from service.runtimes.base import Floats, Images
from service.runtimes.graphs import PIECE
from service.video_request import VideoPlan

SIZE = (32, 32)
LONG = 1 + 2 * (4 * PIECE)
"""Frames of a clip that is decoded in five pieces."""


class Slow(OnnxRuntime):
    """The real runtime, which counts decoded pieces and can be held before one."""

    def __init__(self, bundle: Bundle) -> None:
        self.decoded = 0
        self.go = threading.Event()
        self.go.set()
        super().__init__(bundle, threads=1, max_batch=4)

    def frames(self, latents: Floats) -> Iterator[Images]:
        for piece in super().frames(latents):
            assert self.go.wait(30), "nobody let the decoder go on"
            self.decoded += 1
            yield piece


@pytest.fixture
def runtime(tiny_video_bundle: Path) -> Slow:
    return Slow(Bundle.open(tiny_video_bundle))


@pytest.fixture
def model(tiny_video_bundle: Path, runtime: Slow) -> Iterator[Model]:
    engine, bundle = Engine("cpu", max_queue=64), Bundle.open(tiny_video_bundle)
    engine.add("tiny-wan", runtime, bundle.manifest)
    runtime.decoded = 0
    yield Model(bundle, runtime, engine, "digest", 0)
    runtime.go.set()
    engine.close()
    assert not engine.alive


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def planned(frames: int = 5, seed: int = 7) -> VideoPlan:
    return VideoPlan("a red cube", seed, 2, SIZE, frames, 8.0, "mp4")


def test_clips_equal_those_made_alone_whatever_they_are_batched_with(model: Model, runtime: Slow) -> None:
    """Clips of other lengths are other batches; a length that was never asked for joins when it is."""
    wishes = [(seed, frames) for frames in (5, 9) for seed in range(3)]
    orders = [Order("tiny-wan", "a red cube", (seed,), 2, SIZE, frames=frames) for seed, frames in wishes]
    futures = [model.engine.submit(order)[0] for order in orders]
    for (seed, frames), future in zip(wishes, futures, strict=True):
        alone = generate(runtime, runtime.manifest, ["a red cube"], [seed], steps=2, frames=frames)[0]
        np.testing.assert_array_equal(future.result(60).pixels, alone)
        assert len(alone) == frames
    assert {key.shape for key in model.engine._served["tiny-wan"].keys.values()} == {(4, 3, 16, 16), (4, 5, 16, 16)}
    with pytest.raises(KeyError):
        model.engine.submit(Order("tiny-wan", "a red cube", (1,), 2, (64, 64), frames=5))


def test_begin_steps_and_frames_are_told_in_order(model: Model, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    told: list[Any] = []
    stages: list[str] = []
    filming = Filming(
        model,
        planned(LONG),
        tmp_path / "clip.mp4",
        pool,
        on_stage=lambda index, stage, begun, ended, rows: stages.append(stage),
        on_begin=lambda: told.append("begin"),
        on_step=lambda done, x0: told.append((done, x0.shape)),
    )
    filming.start()
    made = filming.done.result(60)
    assert told == ["begin", (1, (4, 21, 16, 16))], "the last step has nothing left to show"
    assert stages == ["encode_text", "queue", "denoise", "denoise", "decode", "encode_video"]
    assert made.row.pixels.shape == (0, 32, 32, 3), "its frames are in the file"
    assert made.encode_ms > 0 and made.size_bytes == (tmp_path / "clip.mp4").stat().st_size
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == LONG
    assert filming.let_go


def test_compression_begins_while_the_clip_is_decoded(
    model: Model, runtime: Slow, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    write = Clip.write

    def noted(self: Clip, frames: Images) -> None:
        write(self, frames)
        runtime.go.clear()
        written.set()

    monkeypatch.setattr(Clip, "write", noted)
    filming = Filming(model, planned(LONG), tmp_path / "clip.mp4", pool)
    filming.start()
    assert written.wait(60)
    assert not filming.done.done() and runtime.decoded < 5
    monkeypatch.undo()
    runtime.go.set()
    assert filming.done.result(60)


def test_the_decoder_waits_for_a_slow_encoder(
    model: Model, runtime: Slow, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """So that no more than a few pieces of a clip are held at once."""
    free = threading.Event()
    pool.submit(free.wait, 60)
    filming = Filming(model, planned(LONG), tmp_path / "clip.mp4", pool)
    filming.start()
    while filming._pieces.qsize() < SLOTS:
        assert not filming.done.done()
        time.sleep(0.002)
    assert runtime.decoded <= SLOTS + 1
    free.set()
    assert filming.done.result(60)
    assert runtime.decoded == 5


def test_a_clip_can_be_given_up_while_it_is_decoded(
    model: Model, runtime: Slow, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    runtime.go.clear()
    filming = Filming(model, planned(LONG), tmp_path / "clip.mp4", pool)
    filming.start()
    while model.engine.load()[:2] != (0, 0):
        assert not filming.done.done()
        time.sleep(0.002)
    filming.cancel()
    runtime.go.set()
    with pytest.raises(CancelledError):
        filming.done.result(60)
    while not filming.let_go:
        time.sleep(0.002)
    assert runtime.decoded < 5
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_fails_the_clip_and_no_other(
    model: Model, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    broken = Filming(model, planned(LONG), tmp_path / "missing" / "clip.mp4", pool)
    good = Filming(model, planned(seed=8), tmp_path / "clip.mp4", pool)
    for filming in (broken, good):
        filming.start()
    with pytest.raises(OSError, match="No such file"):
        broken.done.result(60)
    assert good.done.result(60).size_bytes > 0
