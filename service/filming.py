"""One clip on its way from the engine to a file: frames are compressed in a thread while the next ones are decoded.

filming = Filming(model, plan, Path("clip.mp4"), pool)
filming.start()                       # raises what Engine.submit raises
made = filming.done.result()          # Made, or what failed; cancel() gives the clip up within one step
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from service import metrics
from service.clips import Clip, shrunk, spritesheet, thumbnail
from service.registry import Model
from service.rows import OnStage, Order, Picture
from service.runtimes.base import Floats, Images, Worn
from service.video_request import VideoPlan

SLOTS = 2
"""Pieces of decoded frames that may wait for the encoder; then the decoder waits."""
WATCH_S = 0.1


@dataclass(frozen=True)
class Made:
    """A finished clip: its file is in place."""

    size_bytes: int
    thumbnail: bytes
    """WebP."""
    spritesheet: bytes
    """JPEG."""
    row: Picture
    """Times of the stages; its frames are in the file."""
    encode_ms: float


class Filming:
    """Frames of one row of the engine into one file."""

    def __init__(
        self,
        model: Model,
        plan: VideoPlan,
        path: Path,
        pool: Executor,
        *,
        tag: str = "",
        owner: str = "",
        deadline_s: float | None = None,
        worn: Worn = (),
        on_begin: Callable[[], None] = lambda: None,
        on_step: Callable[[int, Floats], None] = lambda done, x0: None,
        on_stage: OnStage | None = None,
    ) -> None:
        """deadline_s: from now on; on_begin, on_step: called on the denoising thread, see service.rows.Order.

        on_stage hears of encode_video too, from the first frames to the file.
        """
        self.model, self.plan, self.path = model, plan, path
        self.done: Future[Made] = Future()
        self._pool, self._pieces = pool, queue.SimpleQueue[Images | BaseException | Picture]()
        self._slots, self._lock = threading.Semaphore(SLOTS), threading.Lock()
        self._encoding, self._over = False, False
        self._order = replace(
            order_of(model, plan, tag=tag, owner=owner, deadline_s=deadline_s),
            loras=worn,
            on_begin=lambda index: on_begin(),
            on_step=lambda index, done, x0: on_step(done, x0),
            on_frames=self._on_frames,
            on_stage=on_stage,
        )
        self._row: Future[Picture] | None = None

    def start(self) -> None:
        """Queue the row. Raises QueueFull, DeadlineExceeded, EngineClosed."""
        [self._row] = self.model.engine.submit(self._order)
        self._row.add_done_callback(self._row_is_done)

    def cancel(self) -> None:
        if self._row is not None:
            self._row.cancel()

    @property
    def let_go(self) -> bool:
        """Whether neither the engine nor the encoder works on it any more."""
        held = self._row is not None and self.model.engine.holds(self._row)
        return self.done.done() and not held

    def outlook_s(self) -> float:
        """Seconds until the row is done."""
        return 0.0 if self._row is None else self.model.engine.outlook([self._row]).seconds

    def position(self) -> int:
        """How many waiting rows of the engine begin before it."""
        return 0 if self._row is None else self.model.engine.outlook([self._row]).position

    def _on_frames(self, index: int, frames: Images) -> None:
        """On the decoding thread. Raises when nobody compresses any more, which fails the row."""
        with self._lock:
            if not self._encoding and not self._over:
                self._encoding = True
                self._pool.submit(self._encode)
        while not self._slots.acquire(timeout=WATCH_S):
            if self._over:
                break
        if self._over:
            raise RuntimeError("the clip cannot be written any more")
        self._pieces.put(frames)

    def _row_is_done(self, row: Future[Picture]) -> None:
        error = CancelledError() if row.cancelled() else row.exception()
        with self._lock:
            if self._over:
                return
            if self._encoding:
                self._pieces.put(row.result() if error is None else error)
                return
            self._over = True
        self.done.set_exception(error or RuntimeError("the engine gave no frames"))

    def _encode(self) -> None:
        """On a thread of the pool."""
        try:
            made = self._write()
        except BaseException as error:
            with self._lock:
                self._over = True
            self.done.set_exception(error)
        else:
            with self._lock:
                self._over = True
            self.done.set_result(made)

    def _write(self) -> Made:
        plan, spent_s, begun = self.plan, 0.0, time.perf_counter()
        columns = math.ceil(math.sqrt(plan.frames))
        small: list[Images] = []
        middle: Images | None = None
        count = 0
        with Clip(self.path, plan.output_format, plan.size, plan.fps) as clip:
            while not isinstance(piece := self._pieces.get(), Picture):
                if isinstance(piece, BaseException):
                    raise piece
                start = time.perf_counter()
                clip.write(piece)
                if middle is None and count + len(piece) > plan.frames // 2:
                    middle = piece[plan.frames // 2 - count]
                count += len(piece)
                small.append(shrunk(piece, columns))
                spent_s += time.perf_counter() - start
                self._slots.release()
            start = time.perf_counter()
        assert middle is not None, f"{count} frames came of {plan.frames}"
        pictures = (thumbnail(middle), spritesheet(np.concatenate(small)))
        ended = time.perf_counter()
        encode_ms = (spent_s + ended - start) * 1e3
        if self._order.on_stage is not None:
            self._order.on_stage(0, "encode_video", begun, ended, 1)
        metrics.stage(self.model.name, "encode_video", encode_ms)
        return Made(clip.size_bytes, *pictures, piece, encode_ms)


def order_of(
    model: Model, plan: VideoPlan, *, tag: str = "", owner: str = "", deadline_s: float | None = None
) -> Order:
    """A plan as the engine takes it."""
    return Order(
        model.name,
        plan.prompt,
        (plan.seed,),
        plan.steps,
        plan.size,
        tag=tag,
        owner=owner,
        priority=plan.priority,
        deadline_s=deadline_s,
        cache=plan.cache,
        frames=plan.frames,
    )
