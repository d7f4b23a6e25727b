"""The engine: what computes on one device, as a pipeline of threads.

    submit ─► text ─► denoise ─► decode ─► Future[Picture]      (files are made elsewhere, see service.encode)

Each thread is the only one that calls its graph, so the text of the next rows and the pixels of the last ones are
computed while a batch is denoised. On a processor there may be several lanes, threads that denoise and decode beside
each other: two rows on a core each are done sooner than both on two cores (1.2 to 1.5 times as many per second for a
UNet of 4 M parameters), and a row that is alone still has all cores. The unit is a row, one picture, not a request:
before every denoising step the scheduler says which rows advance, wherever they stand, and rows whose client has gone
or whose deadline has passed leave. A failing row fails alone; when memory runs out the batch is halved, once, and stays
halved.

    engine = Engine("cpu", max_queue=64)
    engine.add("scenes-sdxl", runtime, manifest)
    rows = engine.submit(Order("scenes-sdxl", "a red cube", seeds=(7, 8), steps=4, size=(64, 64)))
    picture = rows[0].result(timeout=10)          # a concurrent.futures.Future[Picture]; cancel() gives the row up
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from distill.bundle import Manifest
from service import metrics
from service.budget import BatchKey, Budget
from service.cache import ByteCache
from service.rows import DeadlineExceeded, EngineClosed, Order, OutOfMemory, Picture, QueueFull, Row, Served
from service.runtimes.base import Conditioning, Images, Runtime, stack
from service.scheduler import RANK, Call, Forecast, Job, Scheduler, together
from service.warmup import agreeing, warm_up

logger = logging.getLogger(__name__)

MEMORY_WORDS = ("out of memory", "failed to allocate", "bad_alloc", "bad allocation")
"""How runtimes say that memory ran out; they have no common class for it."""


SHOW_S = 0.25
"""While the same rows go from step to step, gauges are this old at most."""
OUTLOOK_S = 0.25
"""A forecast of everything serves all who ask within this time; it takes milliseconds when the queue is long."""


class Engine:
    """Owns the runtimes of one device: only the engine's threads call them."""

    def __init__(
        self,
        device: str,
        *,
        max_queue: int,
        lanes: int = 1,
        max_queue_s: float = float("inf"),
        max_owner_rows: int | None = None,
        prompt_cache_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """lanes: steps that are computed at once, of models whose runtime can."""
        self.device, self.lanes, self.budget = device, lanes, Budget()
        self.scheduler = Scheduler(self.budget, lanes)
        self._served: dict[str, Served] = {}
        self._max_queue, self._max_queue_s, self._max_owner_rows = max_queue, max_queue_s, max_owner_rows
        self._clock = clock
        self._prompts: ByteCache[Conditioning] = ByteCache(prompt_cache_bytes)
        self._rows: dict[Job, Row] = {}
        """Every row until it is delivered; the scheduler knows those that have steps left."""
        self._told: dict[Job, Forecast] = {}
        self._told_at = self._show_at = float("-inf")
        self._wake = threading.Condition()
        self._texts: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._closing = False
        loops: list[tuple[str, Callable[[], None]]] = [("text", self._text)]
        loops += [(f"denoise-{lane}", partial(self._denoise, lane)) for lane in range(lanes)]
        loops += [("decode", self._decode)] if lanes == 1 else []
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"{name}-{device}", daemon=True)
            for name, loop in loops
        ]
        for thread in self._threads:
            thread.start()
        metrics.ALIVE.labels(device).set(1)

    replicas = 1

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def models(self) -> list[str]:
        return list(self._served)

    def add(self, name: str, runtime: Runtime, manifest: Manifest, lanes: Sequence[Runtime] = ()) -> None:
        """Serve a model, after measuring what it costs here for every size of picture.

        lanes: more runtimes of it that may compute at the same time, one for each of the engine's lanes.
        """
        able = runtime.capabilities
        keys = {
            (size, frames): BatchKey(
                name, able.runtime, manifest.latent_shape(size, frames or None), manifest.guidance.scale
            )
            for size in manifest.sizes
            for frames in manifest.frames or (0,)
        }
        tables = {steps: sampler.table() for steps, sampler in manifest.samplers.items()}
        lanes = agreeing(manifest, runtime, lanes) if self.lanes > 1 else ()
        served = Served(runtime, manifest, tables, keys, lanes)
        able = served.in_company.capabilities
        with self._wake:
            for key in keys.values():
                self.budget.know(key, able.batch_sizes, served.lane_count)
                if able.loose_sizes:
                    self.budget.know(key._replace(exact=False), able.loose_sizes, served.lane_count)
        warm_up(self.budget, served)
        self._served[name] = served

    def lane_count(self, model: str) -> int:
        """How many steps of a model may be computed at once."""
        return self._served[model].lane_count

    def submit(self, order: Order) -> list[Future[Picture]]:
        """Queue one row per seed, all or none.

        Raises QueueFull, DeadlineExceeded when the deadline cannot be met, EngineClosed; KeyError for an unknown model,
        size or number of steps.
        """
        rows = self._rows_of(order)
        with self._wake:
            if self._closing or not self.alive:
                raise EngineClosed(f"the engine of {order.model} takes no more requests")
            self._sweep()
            self._check_room(order.owner, len(rows))
            if order.deadline_s is not None:
                needed = self._forecast(rows).seconds
                if needed > order.deadline_s:
                    raise DeadlineExceeded(needed)
            for row in rows:
                self.scheduler.add(row.job)
                self._rows[row.job] = row
            self._show()
        for row in rows:
            self._texts.put(row)
        return [row.future for row in rows]

    def forecast(self, order: Order) -> Forecast:
        """When an order would be done, and how many pictures would begin before it, if nothing else came.

        Raises QueueFull if it would not be taken.
        """
        rows = self._rows_of(order)
        with self._wake:
            self._check_room(order.owner, len(rows))
            return self._forecast(rows)

    def expected_s(self, model: str, forecast_s: float) -> float:
        """When the answer of rows with such a forecast will be there."""
        with self._wake:
            return self.budget.expected_s(model, forecast_s)

    def observe_answer(self, model: str, seconds: float) -> None:
        """A request took this much longer than its rows in the engine."""
        with self._wake:
            self.budget.observe_answer(model, seconds)

    def cost_s(self, order: Order) -> float:
        """Seconds of compute of an order in full batches."""
        return self.budget.text_s(order.model) + len(order.seeds) * self.budget.row_s(self._key(order), order.steps)

    def outlook(self, futures: list[Future[Picture]]) -> Forecast:
        """The same for rows that were submitted, a moment old; those that are denoised already count no more."""
        with self._wake:
            now = self._clock()
            if now - self._told_at > OUTLOOK_S:
                self._told, self._told_at = self.scheduler.forecast(now), now
            jobs = [job for job, row in self._rows.items() if row.future in futures and job.remaining > 0]
            if any(job not in self._told for job in jobs):
                self._told, self._told_at = self.scheduler.forecast(now), now
            passed = now - self._told_at
            return together(
                Forecast(max(0.0, self._told[job].seconds - passed), self._told[job].position) for job in jobs
            )

    def decode_s(self, order: Order) -> float:
        """Seconds in which one of an order's rows is decoded."""
        return self.budget.decode_s(self._key(order))

    def holds(self, future: Future[Picture]) -> bool:
        """Whether a row is still somewhere in the engine, also one that was given up."""
        with self._wake:
            self._sweep()
            return any(row.future is future for row in self._rows.values())

    def load(self) -> tuple[int, int, float]:
        """(pictures that wait, pictures that have begun, seconds of compute that they need)."""
        with self._wake:
            waiting = self.scheduler.waiting()
            return waiting, len(self.scheduler) - waiting, self.scheduler.work_s()

    def close(self, timeout_s: float = 30.0) -> None:
        """Refuse new work, finish what is queued, and wait for the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _forecast(self, rows: list[Row]) -> Forecast:
        jobs = [row.job for row in rows]
        told = self.scheduler.forecast(self._clock(), jobs)
        return together(told[job] for job in jobs)

    def _rows_of(self, order: Order) -> list[Row]:
        key, table, now = self._key(order), self._served[order.model].tables[order.steps], self._clock()
        deadline = float("inf") if order.deadline_s is None else now + order.deadline_s
        cost_s, rows = self.budget.row_s(key, order.steps), []
        for index in range(len(order.seeds)):
            job = self.scheduler.new(
                key, order.steps, now, owner=order.owner, deadline=deadline, priority=order.priority, ready=False
            )
            rows.append(Row(order, index, table, job, cost_s))
        return rows

    def _key(self, order: Order) -> BatchKey:
        served = self._served[order.model]
        with self._wake:
            exact = order.exact or not served.in_company.capabilities.loose_sizes
            worn = tuple((lora.digest, scale) for lora, scale in order.loras)
            key = served.key(order.size, order.frames)._replace(exact=exact, loras=worn)
            if not self.budget.knows(key):
                # Larger batches were shown to be bit-exact for the usual lengths alone.
                self.budget.know(key, (1,), served.lane_count)
        return key

    def _check_room(self, owner: str, rows: int) -> None:
        waiting = self.scheduler.waiting()
        excess = waiting + rows - self._max_queue
        if excess > 0:
            raise QueueFull(waiting, self.scheduler.room_s(excess))
        if waiting and (work_s := self.scheduler.work_s()) > self._max_queue_s:
            raise QueueFull(waiting, work_s - self._max_queue_s)
        held = self.scheduler.held(owner)
        if self._max_owner_rows is not None and held + rows > self._max_owner_rows:
            raise QueueFull(held, self.scheduler.room_s(rows), of_owner=True)

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run one thread; if it dies every row fails now, and every later request at once."""
        try:
            loop()
        except Exception:
            logger.exception("a thread of engine %s died; every request to it fails from now on", self.device)
            metrics.DEATHS.labels(self.device).inc()
            with self._wake:
                self._closing = True
                for row in list(self._rows.values()):
                    if self._take(row):
                        row.settle(EngineClosed(f"the engine of {row.order.model} has stopped"))
                self._wake.notify_all()
        finally:
            metrics.ALIVE.labels(self.device).set(0)
            self._texts.put(None)
            self._finished.put(None)

    def _text(self) -> None:
        """Thread: encode prompts in the order of arrival."""
        while (row := self._texts.get()) is not None:
            if self._gone(row):
                continue
            start = time.perf_counter()
            try:
                row.conditioning = self._encode(row)
                row.start()
            except Exception as error:
                self._fail(row, error)
                continue
            ended = time.perf_counter()
            row.encode_text_ms = (ended - start) * 1e3
            row.tell("encode_text", start, ended)
            metrics.stage(row.order.model, "encode_text", row.encode_text_ms)
            with self._wake:
                if row.prompt_cache != "hit":
                    self.budget.observe_text(row.order.model, row.encode_text_ms / 1e3)
                row.job.ready = True
                self._wake.notify()

    def _encode(self, row: Row) -> Conditioning:
        order = row.order
        runtime = self._served[order.model].in_company
        if not order.cache:
            return runtime.encode_text([order.prompt])
        found = self._prompts.get((order.model, order.prompt))
        row.prompt_cache = "miss" if found is None else "hit"
        metrics.CACHE.labels(order.model, "prompt", row.prompt_cache).inc()
        if found is None:
            found = runtime.encode_text([order.prompt])
            size = sum(array.nbytes for array in found.values()) + len(order.prompt)
            self._prompts.put((order.model, order.prompt), found, size)
        return found

    def _denoise(self, lane: int) -> None:
        """Thread: one denoising step after another, until the engine closes and nothing is left."""
        while (found := self._next_call()) is not None:
            call, rows = found
            served = self._served[call.key.model]
            runtime = served.runtime if call.wide or not served.lanes else served.lanes[lane]
            finished = self._step(rows, runtime, call.wide)
            if self.lanes == 1:
                for row in finished:
                    self._finished.put(row)
            elif finished:
                self._prolong(call, len(finished))
                for row in finished:
                    self._develop(row, runtime, call.wide)
            with self._wake:
                self.scheduler.release(call)

    def _next_call(self) -> tuple[Call, list[Row]] | None:
        """Wait for the next step and its rows. None: the engine is closing and everything is delivered."""
        with self._wake:
            while True:
                self._sweep()
                call = self.scheduler.pick(self._clock())
                if call is None or self._clock() > self._show_at or not all(job.done for job in call.jobs):
                    self._show()
                if call is not None:
                    self._wake_another()
                    return call, [self._rows[job] for job in call.jobs]
                if self._closing and not self._rows:
                    self._wake.notify_all()
                    return None
                self._wake.wait(self._until_deadline())

    def _prolong(self, call: Call, rows: int) -> None:
        """A lane goes on with decoding; what else was in its step may run elsewhere."""
        with self._wake:
            call.ends = self._clock() + rows * self.budget.decode_s(call.key)
            self._wake_another()

    def _wake_another(self) -> None:
        """If there is something for one more lane."""
        if self.scheduler.startable():
            self._wake.notify()

    def _until_deadline(self) -> float | None:
        nearest = min((job.deadline for job in self._rows), default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - self._clock()) + 1e-3

    def _sweep(self) -> None:
        """Let go of rows that nobody waits for any more, and fail those that are too late."""
        now, held = self._clock(), len(self._rows)
        for row in list(self._rows.values()):
            if row.future.cancelled():
                metrics.CANCELLED.labels(row.order.model).inc()
                self._take(row)
            elif now > row.job.deadline and self._take(row):
                metrics.LATE.labels(row.order.model).inc()
                row.settle(DeadlineExceeded(now - row.job.submitted))
        if len(self._rows) < held:
            self._wake.notify_all()

    def _gone(self, row: Row) -> bool:
        """Whether a row has left, before more work goes into it."""
        with self._wake:
            self._sweep()
            return row.job not in self._rows

    def _take(self, row: Row) -> bool:
        """Take a row out, under the lock. True for the one caller that may settle it."""
        self.scheduler.remove(row.job)
        mine = self._rows.pop(row.job, None) is not None
        if self._closing:
            self._wake.notify_all()
        return mine

    def _show(self) -> None:
        """Set the gauges, after the queue has changed."""
        self._show_at = self._clock() + SHOW_S
        for name, served in self._served.items():
            jobs = [job for job in self.scheduler if job.key.model == name]
            for priority in RANK:
                waiting = sum(not job.started and job.priority == priority for job in jobs)
                metrics.QUEUED.labels(name, self.device, priority).set(waiting)
            metrics.RUNNING.labels(name, self.device).set(sum(job.started for job in jobs))
            for (width, height), frames in served.keys:
                if frames in (0, *served.manifest.frames[:1]):
                    most = self.budget.sizes(served.keys[(width, height), frames])[-1]
                    metrics.LARGEST_BATCH.labels(name, f"{width}x{height}", self.device).set(most)
        metrics.WORK_SECONDS.labels(self.device).set(self.scheduler.work_s())

    def _step(self, rows: list[Row], runtime: Runtime, wide: bool, again: bool = False) -> list[Row]:
        """One denoising step of some rows; returns those whose last one it was.

        What fails is tried in smaller groups until it is known which row fails.
        """
        try:
            return self._advance(rows, runtime, wide)
        except Exception as error:
            memory, model = ran_out_of_memory(error), rows[0].order.model
            if (memory and again) or (not memory and len(rows) == 1):
                for row in rows:
                    self._fail(row, OutOfMemory(str(error)) if memory else error)
                return []
            size = 1
            if memory:
                with self._wake:
                    size = self.budget.halve(rows[0].job.key, len(rows))
            logger.warning("a step of %d rows of %s failed (%s); trying %d at a time", len(rows), model, error, size)
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            return [row for part in parts for row in self._step(part, runtime, wide, again=again or memory)]

    def _advance(self, rows: list[Row], runtime: Runtime, wide: bool) -> list[Row]:
        for row in rows:
            if row.job.done == 0 and row.order.on_begin is not None:
                row.order.on_begin(row.index)
        steps, key, order = [row.job.done for row in rows], rows[0].job.key, rows[0].order
        model = order.model
        runtime.configure(exact=key.exact, loras=order.loras)
        start = time.perf_counter()
        advanced, x0 = runtime.step(
            np.concatenate([row.latents for row in rows]),
            np.array([row.table.timesteps[k] for row, k in zip(rows, steps, strict=True)], dtype=np.float32),
            np.stack([row.table.rows[k] for row, k in zip(rows, steps, strict=True)]),
            np.concatenate([row.fresh_noise() for row in rows]),
            stack([row.conditioning for row in rows]),
        )
        elapsed = time.perf_counter() - start
        metrics.step(model, len(rows), elapsed)
        for i, row in enumerate(rows):
            if steps[i] == 0:
                row.tell("queue", row.job.submitted, start)
            row.tell("denoise", start, start + elapsed, len(rows))
            row.denoise_ms += elapsed * 1e3
            row.largest_batch = max(row.largest_batch, len(rows))
            if row.order.on_step is not None and row.job.remaining > 1:
                row.order.on_step(row.index, row.job.done + 1, x0[i])
        with self._wake:
            self.budget.observe(key, len(rows), elapsed, wide=wide)
            share_s = elapsed / len(rows) / (1 if wide else self.budget.lanes(key))
            for i, row in enumerate(rows):
                row.latents = advanced[i : i + 1]
                row.spent_s += share_s
                self.scheduler.advance(row.job)
            return [row for row in rows if row.job.remaining == 0]  # the others may be in another lane from here on

    def _decode(self) -> None:
        """Thread: pixels of finished rows, one by one, so that the first is ready while the next is decoded."""
        while (row := self._finished.get()) is not None:
            self._develop(row, self._served[row.order.model].runtime, wide=True)

    def _develop(self, row: Row, runtime: Runtime, wide: bool) -> None:
        """Decode a finished row and deliver it."""
        if self._gone(row):
            return
        start = time.perf_counter()
        try:
            if not np.isfinite(row.latents).all():
                raise FloatingPointError(f"the latents of seed {row.seed} are not finite")
            pixels = self._pixels(row, runtime)
        except Exception as error:
            self._fail(row, OutOfMemory(str(error)) if ran_out_of_memory(error) else error)
            return
        if pixels is None:
            return
        decode_s = time.perf_counter() - start
        row.tell("decode", start, start + decode_s)
        with self._wake:
            self.budget.observe_decode(row.job.key, decode_s)
            row.spent_s += decode_s / (1 if wide else self.budget.lanes(row.job.key))
        self._deliver(row, pixels, decode_s * 1e3)

    def _pixels(self, row: Row, runtime: Runtime) -> Images | None:
        """The picture, or the frames that nobody was told. None: nobody waits for the rest of a clip any more."""
        order = row.order
        if not order.frames:
            return runtime.decode(row.latents)[0]  # type: ignore[no-any-return]
        pieces: list[Images] = []
        for piece in runtime.frames(row.latents):
            if self._gone(row):
                return None
            if order.on_frames is not None:
                order.on_frames(row.index, piece)
            pieces.append(piece if order.on_frames is None else piece[:0])
        return np.concatenate(pieces)

    def _deliver(self, row: Row, pixels: Images, decode_ms: float) -> None:
        model, total_ms = row.order.model, (self._clock() - row.job.submitted) * 1e3
        queue_ms = max(0.0, total_ms - row.encode_text_ms - row.denoise_ms - decode_ms)
        with self._wake:
            mine = self._take(row)
        if not mine:
            return
        metrics.stage(model, "denoise", row.denoise_ms)
        metrics.stage(model, "decode", decode_ms)
        metrics.QUEUE_SECONDS.labels(model).observe(queue_ms / 1e3)
        metrics.COST_RATIO.labels(model).observe(row.spent_s / row.cost_s)
        metrics.IMAGES.labels(model).inc()
        metrics.FRAMES.labels(model).inc(row.order.frames)
        picture = Picture(
            pixels,
            row.seed,
            queue_ms,
            row.encode_text_ms,
            row.denoise_ms,
            decode_ms,
            row.largest_batch,
            row.prompt_cache,
        )
        row.settle(picture)

    def _fail(self, row: Row, error: Exception) -> None:
        with self._wake:
            mine = self._take(row)
        if not mine:
            return
        metrics.FAILED.labels(row.order.model).inc()
        about = {"request_id": row.order.tag}
        logger.error(
            "row failed: %s, request %s, seed %d: %s", row.order.model, row.order.tag, row.seed, error, extra=about
        )
        row.settle(error)


def ran_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY_WORDS)
