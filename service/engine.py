"""The engine: one thread per model that steps a batch of pictures.

The unit is a row, one picture at one step, not a request. Between two denoising steps the engine drops rows whose
client has gone, fills free places from the queue, and then advances every live row by one step, wherever it stands;
so a one-step request that arrives late leaves early, and rows of different step counts share a batch.

    engine = Engine("scenes-sdxl", runtime, manifest, max_batch=8, max_queue=64)
    rows = engine.submit("a red cube", seeds=[7, 8], steps=4, size=(64, 64), tag="request id")
    picture = rows[0].result(timeout=10)          # a concurrent.futures.Future[Picture]; cancel() gives the row up
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from distill.bundle import Manifest
from distill.sampling import Table, noise
from service import metrics
from service.runtimes.base import Conditioning, Floats, Images, Runtime, latent_shape, stack

logger = logging.getLogger(__name__)

PROMPT_CACHE_ENTRIES = 64
EASE = 0.2
"""Weight of the newest measurement in the moving average of seconds per row and step."""


class QueueFull(Exception):
    """No place in the queue: how many pictures wait and in how many seconds there should be one."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} pictures wait")
        self.waiting, self.retry_after_s = waiting, retry_after_s


class EngineClosed(Exception):
    """The engine takes no more work: it is shutting down or its thread has died."""


@dataclass(frozen=True)
class Picture:
    """A finished row: pixels (H, W, 3) uint8 and milliseconds per stage."""

    pixels: Images
    seed: int
    queue_ms: float
    encode_text_ms: float
    denoise_ms: float
    decode_ms: float
    largest_batch: int


@dataclass
class Row:
    """One picture on its way: after ``done`` steps its latents are ``latents`` (1, C, h, w)."""

    prompt: str
    seed: int
    table: Table
    shape: tuple[int, int, int]
    tag: str
    future: Future[Picture] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    queue_ms: float = 0.0
    encode_text_ms: float = 0.0
    denoise_ms: float = 0.0
    largest_batch: int = 0
    done: int = 0
    latents: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    draws: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    conditioning: Conditioning = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        return len(self.table) - self.done

    def start(self, conditioning: Conditioning, encode_text_ms: float) -> None:
        """Draw all noise and set the first latents."""
        self.draws = noise(self.seed, 0, self.shape, draws=len(self.table))
        self.latents = self.draws[:1]
        self.conditioning, self.encode_text_ms = conditioning, encode_text_ms

    def fresh_noise(self) -> Floats:
        """Noise (1, C, h, w) that enters after the current step; nothing enters after the last one."""
        k = self.done + 1
        return self.draws[k : k + 1] if k < len(self.draws) else np.zeros_like(self.latents)

    def fail(self, error: Exception) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Engine:
    """Owns a runtime: only the engine's thread calls it."""

    def __init__(self, name: str, runtime: Runtime, manifest: Manifest, *, max_batch: int, max_queue: int) -> None:
        self.name = name
        self._runtime, self._manifest = runtime, manifest
        self._max_batch, self._max_queue = max_batch, max_queue
        self._tables = {steps: sampler.table() for steps, sampler in manifest.samplers.items()}
        self._prompts: OrderedDict[str, Conditioning] = OrderedDict()
        self._wake = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._live: list[Row] = []
        self._closing = False
        self._row_step_s = runtime.capabilities.step_ms[-1] / runtime.capabilities.batch_sizes[-1] / 1e3
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self, prompt: str, seeds: Sequence[int], steps: int, size: tuple[int, int], tag: str
    ) -> list[Future[Picture]]:
        """Queue one row per seed, all or none. Raises QueueFull and EngineClosed; KeyError for unknown steps."""
        shape = latent_shape(self._manifest, size)
        rows = [Row(prompt, seed, self._tables[steps], shape, tag) for seed in seeds]
        with self._wake:
            if self._closing or not self.alive:
                raise EngineClosed(f"{self.name} takes no more requests")
            self._waiting = deque(self._without_cancelled(self._waiting))
            if len(self._waiting) + len(rows) > self._max_queue:
                raise QueueFull(len(self._waiting), self._work_ahead_s())
            self._waiting.extend(rows)
            metrics.QUEUED.labels(self.name).set(len(self._waiting))
            self._wake.notify()
        return [row.future for row in rows]

    def close(self, timeout_s: float = 30.0) -> None:
        """Refuse new work, finish what is queued, and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._admit():
                self._step_all()
        except Exception:
            logger.exception("engine %s died; every request to it fails from now on", self.name)
        finally:
            with self._wake:
                self._closing = True
                for row in [*self._live, *self._waiting]:
                    row.fail(EngineClosed(f"the engine of {self.name} has stopped"))
                self._live.clear()
                self._waiting.clear()

    def _admit(self) -> bool:
        """Wait for work and fill the free places. False: closing and nothing is left."""
        with self._wake:
            while not (self._live or self._waiting):
                if self._closing:
                    return False
                self._wake.wait()
            self._live = self._without_cancelled(self._live)
            self._waiting = deque(self._without_cancelled(self._waiting))
            free = self._max_batch - len(self._live)
            new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            metrics.QUEUED.labels(self.name).set(len(self._waiting))
        for row in new:
            self._start(row)
        metrics.RUNNING.labels(self.name).set(len(self._live))
        return True

    def _without_cancelled(self, rows: Iterable[Row]) -> list[Row]:
        kept, gone = [], 0
        for row in rows:
            if row.future.cancelled():
                gone += 1
            else:
                kept.append(row)
        metrics.CANCELLED.labels(self.name).inc(gone)
        return kept

    def _start(self, row: Row) -> None:
        """Encode the prompt (or find it in the cache) and let the row live; a failure is this row's alone."""
        start = time.perf_counter()
        row.queue_ms = (start - row.submitted) * 1e3
        metrics.QUEUE_SECONDS.labels(self.name).observe(row.queue_ms / 1e3)
        try:
            row.start(self._encode(row.prompt), 0.0)
        except Exception as error:
            self._fail(row, error)
            return
        row.encode_text_ms = (time.perf_counter() - start) * 1e3
        metrics.stage(self.name, "encode_text", row.encode_text_ms)
        self._live.append(row)

    def _encode(self, prompt: str) -> Conditioning:
        found = self._prompts.get(prompt)
        metrics.PROMPT_CACHE.labels(self.name, "miss" if found is None else "hit").inc()
        if found is None:
            found = self._prompts[prompt] = self._runtime.encode_text([prompt])
            if len(self._prompts) > PROMPT_CACHE_ENTRIES:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt)
        return found

    def _step_all(self) -> None:
        """One denoising step of every live row, one call per picture size; finished rows are decoded and leave."""
        for shape in {row.shape for row in self._live}:
            self._step([row for row in self._live if row.shape == shape])
        finished = [row for row in self._live if row.remaining == 0]
        self._live = [row for row in self._live if row.remaining > 0 and not row.future.done()]
        for row in finished:
            self._finish(row)
        metrics.RUNNING.labels(self.name).set(len(self._live))

    def _step(self, rows: list[Row]) -> None:
        start = time.perf_counter()
        try:
            advanced, _ = self._runtime.step(
                np.concatenate([row.latents for row in rows]),
                np.array([row.table.timesteps[row.done] for row in rows], dtype=np.float32),
                np.stack([row.table.rows[row.done] for row in rows]),
                np.concatenate([row.fresh_noise() for row in rows]),
                stack([row.conditioning for row in rows]),
            )
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            logger.warning("a step of %d rows of %s failed (%s); trying them singly", len(rows), self.name, error)
            for row in rows:
                self._step([row])
            return
        elapsed = time.perf_counter() - start
        self._row_step_s += EASE * (elapsed / len(rows) - self._row_step_s)
        metrics.STEPS.labels(self.name).inc(len(rows))
        metrics.BATCH_ROWS.labels(self.name).observe(len(rows))
        for i, row in enumerate(rows):
            row.latents = advanced[i : i + 1]
            row.done += 1
            row.denoise_ms += elapsed * 1e3
            row.largest_batch = max(row.largest_batch, len(rows))

    def _finish(self, row: Row) -> None:
        if row.future.done():
            return
        start = time.perf_counter()
        try:
            if not np.isfinite(row.latents).all():
                raise FloatingPointError(f"the latents of seed {row.seed} are not finite")
            pixels = self._runtime.decode(row.latents)[0]
        except Exception as error:
            self._fail(row, error)
            return
        decode_ms = (time.perf_counter() - start) * 1e3
        metrics.stage(self.name, "denoise", row.denoise_ms)
        metrics.stage(self.name, "decode", decode_ms)
        metrics.IMAGES.labels(self.name).inc()
        picture = Picture(
            pixels, row.seed, row.queue_ms, row.encode_text_ms, row.denoise_ms, decode_ms, row.largest_batch
        )
        if row.future.set_running_or_notify_cancel():
            row.future.set_result(picture)

    def _fail(self, row: Row, error: Exception) -> None:
        metrics.FAILED.labels(self.name).inc()
        logger.error("row failed: model %s, request %s, seed %d: %s", self.name, row.tag, row.seed, error)
        row.fail(error)

    def _work_ahead_s(self) -> float:
        """Estimated seconds until the queue has moved by one batch."""
        ahead = list(self._waiting)[: self._max_batch]
        return self._row_step_s * sum(row.remaining for row in [*self._live, *ahead])
