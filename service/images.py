"""One request for pictures, from its plan to files: known files, the engine, the encoder.

``Drawing`` is a request on its way; the three forms of its answer (JSON, events, raw bytes) are in service.answers.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from opentelemetry.trace import Tracer
from starlette.requests import Request

from service import errors, metrics, tracing
from service.cache import ByteCache
from service.edge import STATE, RequestState
from service.encode import EncodePool
from service.errors import ApiError, Disconnected
from service.idempotency import Gone, Replies
from service.loras import Loras
from service.preview import preview, preview_steps
from service.registry import Model, Registry
from service.rows import DeadlineExceeded, EngineClosed, OnStage, Order, OutOfMemory, Picture, QueueFull
from service.runtimes.base import Floats, Worn
from service.schemas import Plan
from service.settings import Settings
from service.studio import Studio

WATCH_S = 0.05
"""How often a waiting request looks whether its client is still there."""
TELL_S = 0.25
"""How often a stream tells its place in the queue while nothing happens."""


@dataclass
class Hub:
    """What requests share."""

    settings: Settings
    registry: Registry
    pool: EncodePool
    studio: Studio = field(init=False)
    loras: Loras = field(init=False)
    files: ByteCache[bytes] = field(init=False)
    replies: Replies = field(default_factory=Replies)
    running: dict[tuple[str, str], list[Drawing]] = field(default_factory=dict)
    """By owner and request id, for those who want to cancel."""
    tracer: Tracer | None = None
    """None: spans go nowhere."""

    def __post_init__(self) -> None:
        self.loras = Loras(self.settings, self.registry)
        self.studio = Studio(self.settings, self.registry, loras=self.loras)
        self.files = ByteCache(self.settings.result_cache_mb << 20)

    def open(self) -> None:
        """What must be done between loading models and serving them. Raises StoreError."""
        self.loras.open()
        self.studio.open()


@dataclass(frozen=True)
class File:
    """A finished picture as a file; ``picture`` is None when the file was known already."""

    data: bytes
    seed: int
    picture: Picture | None
    encode_ms: float = 0.0


class Preview(NamedTuple):
    """A file that shows how far a picture is."""

    data: bytes
    number: int
    """From 0."""


class Progress(NamedTuple):
    """How far a picture is: 0 … 100 with the steps done, the rows before it in the queue and the time to go."""

    steps_done: int
    percent: int
    position: int
    eta_ms: float


class Drawing:
    """The pictures of one request on their way. Raises ApiError when there is no place for them.

    Use as a context: on leaving, whatever is not done is given up within one denoising step.
    """

    def __init__(self, hub: Hub, model: Model, plan: Plan, state: RequestState) -> None:
        self.hub, self.model, self.plan, self.state = hub, model, plan, state
        self.id = f"img_{secrets.token_hex(12)}"
        self.begun = time.perf_counter()
        self._worn = hub.loras.resolve(model, plan.loras)
        self._on_stage = tracing.of_request(hub.tracer, state.request_id, model.name, plan.steps, len(plan.seeds))
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[tuple[int, Floats] | None] = asyncio.Queue()
        self._known = {seed: data for seed in plan.seeds if (data := self._look_up(seed)) is not None}
        self._missing = tuple(seed for seed in plan.seeds if seed not in self._known)
        self._rows = self._submit() if self._missing else []
        self.tokens = model.runtime.tokenize([plan.prompt])  # while the engine computes
        self._waiting = asyncio.gather(*(asyncio.wrap_future(row) for row in self._rows))
        self._waiting.add_done_callback(lambda _: self._steps.put_nowait(None))
        self._name = (state.owner, state.request_id)

    def __enter__(self) -> Drawing:
        self.hub.running.setdefault(self._name, []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.running[self._name].remove(self)
        if not self.hub.running[self._name]:
            del self.hub.running[self._name]
        self._waiting.cancel()
        self.cancel()

    def cancel(self) -> None:
        for row in self._rows:
            row.cancel()

    async def files(self, gone: Gone) -> list[File]:
        """The files in the order of the plan's seeds. Raises ApiError and Disconnected."""
        while not (await asyncio.wait({self._waiting}, timeout=WATCH_S))[0]:
            if await gone():
                raise Disconnected
        pictures = dict(zip(self._missing, self._pictures(), strict=True))
        files = await asyncio.gather(*(self._encode(index, p) for index, p in enumerate(pictures.values())))
        encoded = dict(zip(pictures, files, strict=True))
        self._observe(pictures.values())
        return [encoded[seed] if seed in encoded else File(self._known[seed], seed, None) for seed in self.plan.seeds]

    def _observe(self, pictures: Collection[Picture]) -> None:
        """Tell the engine what was not its own time, so that it can tell others when to expect an answer."""
        if pictures:
            engine_ms = max(p.queue_ms + p.encode_text_ms + p.denoise_ms + p.decode_ms for p in pictures)
            self.model.engine.observe_answer(self.model.name, time.perf_counter() - self.begun - engine_ms / 1e3)

    async def progress(self, gone: Gone) -> AsyncIterator[Preview | Progress | None]:
        """What can be told until the picture is done: progress if asked for, and previews. None: nothing new."""
        shown = preview_steps(self.plan.steps, self.plan.partial_images)
        done, told = 0, float("-inf")
        while True:
            if self.plan.progress and time.monotonic() - told > TELL_S and self._rows:
                told = time.monotonic()
                yield self._progress(done)
            try:
                step = await asyncio.wait_for(self._steps.get(), WATCH_S)
            except TimeoutError:
                if await gone():
                    raise Disconnected from None
                yield None
                continue
            if step is None:
                return
            (done, x0), told = step, float("-inf")
            if done in shown:
                pixels = preview(x0, self.model.bundle.manifest.preview, self.plan.size)
                data, _ = await self.hub.pool.encode(pixels, self.plan.output_format, self.plan.compression)
                if shown[done] == 0:
                    metrics.PREVIEW_SECONDS.labels(self.model.name).observe(time.perf_counter() - self.begun)
                yield Preview(data, shown[done])

    def _progress(self, done: int) -> Progress:
        ahead = self.model.engine.outlook(self._rows)
        percent = round(100 * done / (self.plan.steps + 1))
        eta_s = self.model.engine.expected_s(self.model.name, ahead.seconds)
        return Progress(done, percent, ahead.position, round(eta_s * 1e3, 1))

    def _submit(self) -> list[Future[Picture]]:
        plan = self.plan
        tell = None
        if plan.stream and (plan.partial_images or plan.progress):

            def tell(index: int, done: int, x0: Floats) -> None:
                self._loop.call_soon_threadsafe(self._steps.put_nowait, (done, x0))

        order = order_of(self.model, plan, self.state, self._missing, self._worn, tell, self._on_stage)
        try:
            return self.model.engine.submit(order)
        except (QueueFull, DeadlineExceeded, EngineClosed) as error:
            raise self._told(error) from None

    def _pictures(self) -> list[Picture]:
        """What the engine made. A failed row fails the request, with what may be told of it."""
        try:
            return list(self._waiting.result())
        except asyncio.CancelledError:
            raise errors.cancelled() from None
        except Exception as error:
            raise self._told(error) from None

    def _told(self, error: Exception) -> ApiError:
        return explain(error, self.plan.deadline_s, self.state)

    async def _encode(self, index: int, picture: Picture) -> File:
        data, milliseconds = await self.hub.pool.encode(picture.pixels, self.plan.output_format, self.plan.compression)
        if self._on_stage is not None:
            ended = time.perf_counter()
            self._on_stage(index, "encode_image", ended - milliseconds / 1e3, ended, 1)
        metrics.stage(self.model.name, "encode_image", milliseconds)
        if self.plan.cache:
            self.hub.files.put(self._key(picture.seed), data, len(data) + 500)
        return File(data, picture.seed, picture, milliseconds)

    def _look_up(self, seed: int) -> bytes | None:
        if not self.plan.cache or not self.hub.files.max_bytes:
            return None
        found = self.hub.files.get(self._key(seed))
        metrics.CACHE.labels(self.model.name, "result", "miss" if found is None else "hit").inc()
        return found

    def _key(self, seed: int) -> Hashable:
        """Everything that decides the bytes of a file; and the owner, so that nobody sees what others asked for."""
        plan, able = self.plan, self.model.runtime.capabilities
        computed = (self.model.digest, able.runtime, able.version, able.precision, able.device)
        worn = tuple((lora.digest, scale) for lora, scale in self._worn)
        return (
            self.state.owner,
            computed,
            (plan.prompt, seed, plan.steps, plan.size, plan.exact, worn),
            (plan.output_format, plan.compression),
        )


def order_of(
    model: Model,
    plan: Plan,
    state: RequestState,
    seeds: tuple[int, ...],
    worn: Worn = (),
    on_step: Callable[[int, int, Floats], None] | None = None,
    on_stage: OnStage | None = None,
) -> Order:
    """A plan as the engine takes it."""
    return Order(
        model.name,
        plan.prompt,
        seeds,
        plan.steps,
        plan.size,
        tag=state.request_id,
        owner=state.owner,
        priority=plan.priority,
        deadline_s=plan.deadline_s,
        cache=plan.cache,
        exact=plan.exact,
        loras=worn,
        on_step=on_step,
        on_stage=on_stage,
    )


def explain(error: Exception, deadline_s: float | None, state: RequestState) -> ApiError:
    """What the engine raised, as the caller sees it."""
    if isinstance(error, QueueFull):
        make = errors.key_limit if error.of_owner else errors.queue_full
        return make(error.waiting, error.retry_after_s)
    if isinstance(error, DeadlineExceeded):
        return errors.deadline_exceeded(deadline_s or 0.0, error.needed_s)
    if isinstance(error, EngineClosed):
        return errors.unavailable(str(error), "draining", retry_after_s=5)
    if isinstance(error, OutOfMemory):
        return errors.out_of_memory()
    # The engine has logged what happened, with this request id.
    return errors.internal(state.request_id)


async def draw(hub: Hub, model: Model, plan: Plan, request: Request) -> list[File]:
    """The files of a plan; in every case no row stays behind."""
    with Drawing(hub, model, plan, request.scope[STATE]) as drawing:
        return await drawing.files(request.is_disconnected)


@dataclass
class Count:
    """One request to be counted; ``postponed``: it goes well so far and will be counted at its end."""

    postponed: bool = False


@contextmanager
def counted(hub: Hub) -> Iterator[Count]:
    """Count how a request ended, whatever that was. A client that left becomes ApiError 408."""
    outcome, start, label, count = "error", time.perf_counter(), hub.registry.label, Count()
    try:
        yield count
        outcome = "ok"
        if not count.postponed:
            metrics.REQUEST_SECONDS.labels(label).observe(time.perf_counter() - start)
    except Disconnected:
        outcome = "disconnected"
        raise ApiError(408, "the client closed the connection", code="client_disconnected") from None
    except asyncio.CancelledError:
        outcome = "disconnected"
        raise
    except ApiError as error:
        outcome = OUTCOMES.get(error.code) or ("invalid" if error.status < 500 else "error")
        if outcome == "rejected":
            metrics.REJECTIONS.labels(error.code).inc()
        raise
    finally:
        if not count.postponed:
            metrics.REQUESTS.labels(label, outcome).inc()


OUTCOMES = {
    "queue_full": "rejected",
    "key_limit": "rejected",
    "cancelled": "cancelled",
    "deadline_exceeded": "deadline",
    "model_loading": "unavailable",
    "failed": "unavailable",
    "draining": "unavailable",
}
"""By the code of an error; any other is invalid below 500 and error above."""
