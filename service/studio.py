"""The studio: takes video jobs from the store, feeds them to the engines, and puts what comes of them back.

A job's state lies in the store, so that it outlives the process; what lives only here is the clip on its way and the
events of its making. Jobs wait in the store and a few at a time go to an engine, of whoever has the fewest
there, so that neither pictures nor other keys wait behind a long list. Threads: one keeps the books (all changes of
state, in order), some compress, one looks round (deadlines, results past their time, jobs that found no place).
"""

from __future__ import annotations

import base64
import errno
import logging
import shutil
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from service import errors, metrics
from service.encode import encode
from service.errors import ApiError
from service.filming import Filming, Made, order_of
from service.fleet import Engines
from service.jobs import Job, JobStore, Order, StoreError
from service.loras import Loras
from service.preview import preview
from service.registry import Model, Registry
from service.rows import DeadlineExceeded, EngineClosed, OnStage, OutOfMemory, QueueFull
from service.runtimes.base import Floats
from service.scheduler import RANK
from service.settings import Settings
from service.video_request import VideoPlan

logger = logging.getLogger(__name__)

FED = 4
"""Jobs per replica that have left the store's queue: a batch that waits while another one runs."""
LOOK_S = 1.0
SWEEP_S = 30.0
LET_GO_S = 5.0
EVENTS = 256
"""Of one job that are kept for those who come back."""
REMEMBERED = 64
"""Finished jobs whose events are kept."""
LEAST_FREE_BYTES = 64 << 20
"""Of the disk, below which no job is taken."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. ``id`` grows with every event of a job, over restarts too."""

    id: int
    kind: str
    data: dict[str, Any]


@dataclass(eq=False)
class Take:
    """One attempt at a job in this process."""

    job: Job
    model: Model
    plan: VideoPlan
    on_stage: OnStage | None = None
    """The trace of the request for it; a job that outlived its process has none."""
    filming: Filming | None = None
    """None while it waits in the store's queue."""
    steps_done: int = 0
    begun: bool = False
    events: list[Event] = field(default_factory=list)

    def tell(self, kind: str, **data: Any) -> None:
        number = (self.job.attempts + 1) * 1_000_000 + (self.events[-1].id % 1_000_000 + 1 if self.events else 1)
        self.events = [*self.events[-EVENTS + 1 :], Event(number, kind, data)]

    @property
    def percent(self) -> int:
        return round(100 * self.steps_done / (self.plan.steps + 1))


class Studio:
    """All video jobs of a server."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        clock: Callable[[], float] = time.time,
        loras: Loras | None = None,
    ) -> None:
        self.settings, self.registry, self._clock = settings, registry, clock
        self._loras = loras or Loras(settings, registry)
        self.pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="clips")
        """Compresses clips."""
        self._books = ThreadPoolExecutor(1, thread_name_prefix="books")
        self._lock = threading.RLock()
        self._takes: dict[str, Take] = {}
        """Unfinished jobs by id, in the order of their arrival."""
        self._remembered: OrderedDict[str, list[Event]] = OrderedDict()
        self._store: JobStore | None = None
        self._broken = False
        """Whether there is no store where there should be one."""
        self._closing = threading.Event()
        self._looking = threading.Thread(target=self._look_round, name="studio", daemon=True)

    def open(self) -> None:
        """Open the store if there is a model for videos, or jobs of another day.

        A folder that cannot be used leaves a server without video jobs, where it has models for pictures; raises
        StoreError where it has none.
        """
        kinds = {model.films for model in self.registry.all()}
        if True not in kinds and not (self.settings.data / "jobs.db").is_file():
            return
        try:
            self._store = JobStore(self.settings.data)
        except StoreError as error:
            if False not in kinds:
                raise
            logger.error("no video jobs are taken: %s", error)
            self._broken = True
            return
        waiting = self._store.recover(self._clock())
        for job in waiting:
            self._resume(job)
        if waiting:
            logger.info("%d video jobs of the last run are queued", len(waiting))
        self._looking.start()
        self._feed()

    def close(self) -> None:
        """Take no more; what has not begun stays queued in the store, what has begun is finished by the engines."""
        self._closing.set()
        with self._lock:
            waiting = [take.filming for take in self._takes.values() if take.filming is not None and not take.begun]
        for filming in waiting:
            filming.cancel()

    def end(self) -> None:
        """After the engines have stopped: the last entries of the books."""
        self._closing.set()
        self.pool.shutdown(wait=True)
        self._books.shutdown(wait=True)
        if self._looking.is_alive():
            self._looking.join()
        if self._store is not None:
            self._store.close()

    @property
    def store(self) -> JobStore:
        if self._broken:
            text = "this server cannot keep video jobs, its log says why; POST /v1/videos/sync needs none"
            raise errors.unavailable(text, "storage_unavailable", retry_after_s=30)
        if self._store is None:
            raise errors.unsupported("model", "this server has no model for videos; see GET /v1/models")
        return self._store

    @property
    def _empty(self) -> bool:
        """Whether there can be no job at all."""
        return self._store is None and not self._broken

    # --- what callers do; every one of these may wait for the disk, so call it in a thread ---------------------------

    def add(self, model: Model, plan: VideoPlan, owner: str, on_stage: OnStage | None = None) -> Job:
        """A new job, kept before this returns. Raises ApiError when there is no place for it.

        on_stage: hears of its stages, as Filming's does.
        """
        store = self.store
        if self._closing.is_set():
            raise errors.unavailable("the server is shutting down", "draining", retry_after_s=5)
        job = Job.new(owner=owner, model=model.name, plan=plan.kept(), now=self._clock())
        with self._lock:
            self._check_place(model, plan, owner)
            try:
                if shutil.disk_usage(store.folder).free < LEAST_FREE_BYTES:
                    raise OSError(errno.ENOSPC, "the disk is nearly full")
                store.add(job)
            except (OSError, sqlite3.Error) as error:
                logger.error("no video job can be kept: %s", error)
                raise errors.unavailable("the server's disk is full; try again later", "storage_full") from None
            self._takes[job.id] = take = Take(job, model, plan, on_stage)
            take.tell("queued")
            metrics.UNFINISHED_VIDEOS.set(len(self._takes))
        self._feed()
        return job

    def get(self, job_id: str, owner: str) -> Job:
        """Raises ApiError 404, also for the job of another key."""
        job = None if self._empty else self.store.get(job_id)
        if job is None or job.owner != owner:
            raise ApiError(404, f"there is no video {job_id[:64]!r}", code="not_found", param="video_id")
        return job

    def page(self, owner: str, *, after: str | None, limit: int, order: Order) -> tuple[list[Job], bool]:
        """Jobs of a key by age, and whether there are more; see JobStore.page."""
        return ([], False) if self._empty else self.store.page(owner, after=after, limit=limit, order=order)

    def cancel(self, job_id: str, owner: str) -> Job:
        """Fail a job with the code "cancelled"; a finished one stays as it is."""
        self.get(job_id, owner)
        if self.store.fail(job_id, self._clock(), "cancelled", "the video was cancelled"):
            self._drop(job_id)
        return self.get(job_id, owner)

    def delete(self, job_id: str, owner: str) -> bool:
        """Forget a job and its files. False when the engine still holds it after a while: it lets go by itself."""
        self.get(job_id, owner)
        take = self._drop(job_id)
        self.store.delete(job_id)
        return take is None or self._wait(take)

    def take(self, job_id: str) -> Take | None:
        """What is known of an unfinished job beyond the store."""
        with self._lock:
            return self._takes.get(job_id)

    def events(self, job_id: str, after: int) -> list[Event]:
        """What happened to a job since the event of that number, as far as it is remembered."""
        with self._lock:
            take = self._takes.get(job_id)
            events = take.events if take is not None else self._remembered.get(job_id, [])
        return [event for event in events if event.id > after]

    def outlook(self, take: Take) -> tuple[int, float]:
        """(jobs and rows before it, seconds until it is done)."""
        with self._lock:
            ahead = [other for other in self._takes.values() if other.model.engine is take.model.engine]
        if take.filming is not None:
            seconds = take.filming.outlook_s()
            decode_s = take.model.engine.decode_s(order_of(take.model, take.plan))
            return take.filming.position(), max(seconds, decode_s)
        before = ahead[: ahead.index(take)] if take in ahead else ahead
        engine = take.model.engine
        seconds = sum(engine.cost_s(order_of(other.model, other.plan)) for other in (*before, take))
        return len(before), seconds

    def unfinished(self, engine: Engines) -> int:
        """Jobs of an engine."""
        with self._lock:
            return sum(take.model.engine is engine for take in self._takes.values())

    def check_place(self, model: Model, plan: VideoPlan, owner: str) -> None:
        """Raises ApiError 429 when there are as many jobs as there may be."""
        with self._lock:
            self._check_place(model, plan, owner)

    # --- the way of a job --------------------------------------------------------------------------------------------

    def _check_place(self, model: Model, plan: VideoPlan, owner: str) -> None:
        """Under the lock."""
        mine = sum(take.job.owner == owner for take in self._takes.values())
        full, of_owner = len(self._takes) >= self.settings.max_videos, mine >= self.settings.max_key_videos
        if full or (of_owner and owner):
            wait_s = model.engine.cost_s(order_of(model, plan))
            raise errors.too_many_videos(len(self._takes) if full else mine, wait_s, of_key=not full)

    def _resume(self, job: Job) -> None:
        try:
            model, plan = self.registry.get_loaded(job.model), VideoPlan.of(job.plan)
            if plan.size not in model.bundle.manifest.sizes or plan.steps not in model.bundle.manifest.samplers:
                raise KeyError(f"{job.model} has no longer {plan.steps} steps at {plan.size[0]}x{plan.size[1]}")
        except (KeyError, TypeError) as error:
            message = f"the server was started again without what this video needs ({error.args[0]}); send it again"
            self.store.fail(job.id, self._clock(), "model_not_found", message)
            return
        self._takes[job.id] = take = Take(job, model, plan)
        take.tell("queued")

    def _feed(self) -> None:
        """Let engines have the next jobs, as far as there is place."""
        while not self._closing.is_set():
            with self._lock:
                take = self._next()
                if take is None:
                    return
                left_s = None
                if take.plan.deadline_s is not None:
                    left_s = take.job.created_at + take.plan.deadline_s - self._clock()
                try:
                    filming = self._filming(take, left_s)
                    filming.start()
                except QueueFull:
                    return
                except (DeadlineExceeded, EngineClosed, ApiError) as error:
                    self._enter(self._failed, take, error)
                    del self._takes[take.job.id]
                    continue
                take.filming = filming
            filming.done.add_done_callback(partial(self._enter, self._ended, take))

    def _next(self) -> Take | None:
        """Of the owner with the fewest jobs at work, the first by priority and age whose engine has place."""
        fed: dict[int, int] = {}
        held: dict[str, int] = {}
        for take in self._takes.values():
            if take.filming is not None:
                fed[id(take.model.engine)] = fed.get(id(take.model.engine), 0) + 1
                held[take.job.owner] = held.get(take.job.owner, 0) + 1
        unfed = [take for take in self._takes.values() if take.filming is None]
        waiting = [t for t in unfed if fed.get(id(t.model.engine), 0) < FED * t.model.engine.replicas]
        return min(waiting, key=lambda take: (held.get(take.job.owner, 0), RANK[take.plan.priority]), default=None)

    def _filming(self, take: Take, deadline_s: float | None) -> Filming:
        job = take.job

        def begin() -> None:
            if not take.begun:
                take.begun = True
                self._enter(self._begun, take)

        def step(done: int, x0: Floats) -> None:
            take.steps_done = done
            self._enter(self._stepped, take, done, x0)

        return Filming(
            take.model,
            take.plan,
            self.store.path(job.id),
            self.pool,
            tag=job.id,
            owner=job.owner,
            deadline_s=deadline_s,
            worn=self._loras.resolve(take.model, take.plan.loras),
            on_begin=begin,
            on_step=step,
            on_stage=take.on_stage,
        )

    def _enter(self, what: Callable[..., None], *values: Any) -> None:
        """Write into the books, in the order of what happened."""
        try:
            self._books.submit(self._safely, what, *values)
        except RuntimeError:
            logger.warning("the server is stopping; what a job did last is not in the books and is done again")

    def _safely(self, what: Callable[..., None], *values: Any) -> None:
        try:
            what(*values)
        except Exception:
            logger.exception("the books could not be kept")

    def _begun(self, take: Take) -> None:
        if not self.store.begin(take.job.id, self._clock()) and take.filming is not None:
            take.filming.cancel()
            return
        take.tell("progress", progress=0, steps_done=0)

    def _stepped(self, take: Take, done: int, x0: Floats) -> None:
        take.tell("progress", progress=round(100 * done / (take.plan.steps + 1)), steps_done=done)
        pixels = preview(x0, take.model.bundle.manifest.preview, take.plan.size)
        data = base64.b64encode(encode(pixels, "jpeg", 85)).decode("ascii")
        take.tell("preview", b64_json=data, output_format="jpeg", steps_done=done)

    def _ended(self, take: Take, made: Future[Made]) -> None:
        error = made.exception()
        if error is None:
            self._made(take, made.result())
        elif self._closing.is_set() and isinstance(error, CancelledError | EngineClosed):
            return  # it stays in the store, for the next start
        elif not isinstance(error, CancelledError):
            self._failed(take, error)
        self._forget(take.job.id)
        self._feed()

    def _forget(self, job_id: str) -> Take | None:
        """A job is finished: only its events are kept for a while."""
        with self._lock:
            take = self._takes.pop(job_id, None)
            metrics.UNFINISHED_VIDEOS.set(len(self._takes))
            if take is not None:
                self._remembered[job_id] = take.events
                while len(self._remembered) > REMEMBERED:
                    self._remembered.popitem(last=False)
        return take

    def _made(self, take: Take, made: Made) -> None:
        job, store, row = take.job, self.store, made.row
        told = {
            "queue_ms": round(row.queue_ms, 1),
            "encode_text_ms": round(row.encode_text_ms, 1),
            "denoise_ms": round(row.denoise_ms, 1),
            "decode_ms": round(row.decode_ms, 1),
            "encode_video_ms": round(made.encode_ms, 1),
            "steps": take.plan.steps,
            "batch": row.largest_batch,
        }
        try:
            store.path(job.id, "thumbnail").write_bytes(made.thumbnail)
            store.path(job.id, "spritesheet").write_bytes(made.spritesheet)
            size = made.size_bytes + len(made.thumbnail) + len(made.spritesheet)
            kept = store.complete(job.id, self._clock(), ttl_s=self.settings.video_ttl_s, size=size, metrics=told)
        except (OSError, sqlite3.Error) as error:
            self._failed(take, error)
            return
        if not kept:
            store.remove_files(job.id)
            return
        metrics.VIDEOS.labels(take.model.name, "completed").inc()
        total_ms = sum(value for name, value in told.items() if name.endswith("_ms"))
        logger.info("video %s: %d frames in %.0f ms", job.id, take.plan.frames, total_ms)
        store.sweep(self._clock(), self.settings.max_video_mb << 20)

    def _failed(self, take: Take, error: BaseException) -> None:
        code, message = explain(error, take.job.id)
        self.store.remove_files(take.job.id)
        if self.store.fail(take.job.id, self._clock(), code, message):
            metrics.VIDEOS.labels(take.model.name, "failed").inc()
            logger.error("video %s failed: %s", take.job.id, error)

    def _drop(self, job_id: str) -> Take | None:
        """Give up a job that somebody cancelled or deleted."""
        take = self._forget(job_id)
        if take is not None:
            metrics.VIDEOS.labels(take.model.name, "cancelled").inc()
            if take.filming is not None:
                take.filming.cancel()
            self._feed()
        return take

    def _wait(self, take: Take) -> bool:
        deadline = time.monotonic() + LET_GO_S
        while take.filming is not None and not take.filming.let_go:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        self.store.remove_files(take.job.id)
        return True

    def _look_round(self) -> None:
        """Thread."""
        swept = float("-inf")
        while not self._closing.wait(LOOK_S):
            self._enter(self._give_up_late_ones)
            self._feed()
            if time.monotonic() - swept > SWEEP_S:
                swept = time.monotonic()
                self._enter(self._sweep)

    def _sweep(self) -> None:
        for job_id in self.store.sweep(self._clock(), self.settings.max_video_mb << 20):
            logger.info("video %s has expired", job_id)

    def _give_up_late_ones(self) -> None:
        """Jobs whose deadline passed before an engine had them; those that it has it watches itself."""
        now = self._clock()
        with self._lock:
            late = [
                take
                for take in self._takes.values()
                if take.filming is None
                and take.plan.deadline_s is not None
                and take.job.created_at + take.plan.deadline_s < now
            ]
            for take in late:
                del self._takes[take.job.id]
        for take in late:
            self._failed(take, DeadlineExceeded(now - take.job.created_at))


def explain(error: BaseException, job_id: str) -> tuple[str, str]:
    """(code, message) of what became of a job, as its owner sees them."""
    if isinstance(error, ApiError):
        return error.code, error.message
    if isinstance(error, DeadlineExceeded):
        message = f"the deadline passed; {error.needed_s:.1f} s are needed, give more time or fewer frames"
        return "deadline_exceeded", message
    if isinstance(error, OutOfMemory | MemoryError):
        return "out_of_memory", "memory ran out, also with a smaller batch; ask for fewer frames or a smaller size"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "disk_full", "the server's disk is full; delete videos that are not needed and send the request again"
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        return "disk_full", "the server's disk is full; delete videos that are not needed and send the request again"
    if isinstance(error, EngineClosed):
        return "interrupted", "the server stopped while it made this video; send the request again"
    return "internal_error", f"internal error; the server's log has the details under id {job_id}"


__all__ = ["Event", "StoreError", "Studio", "Take", "explain"]
