"""Videos over HTTP, in the shapes of OpenAI's API: jobs to poll or to follow, and a clip in one answer.

POST   /v1/videos                 a job (JSON, or the form that OpenAI's client sends)
POST   /v1/videos/sync            the clip itself
GET    /v1/videos                 jobs of this key: after, limit, order
GET    /v1/videos/{id}            one job; DELETE forgets it
POST   /v1/videos/{id}/cancel     gives it up and keeps the record
GET    /v1/videos/{id}/content    variant=video|thumbnail|spritesheet, with ranges
GET    /v1/videos/{id}/events     progress and previews as they come, again from Last-Event-ID on
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, get_args

from fastapi import FastAPI, Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse, JSONResponse, StreamingResponse

from service import errors, schemas, tracing, video_request
from service.clips import MEDIA_TYPES
from service.edge import STATE, RequestState
from service.errors import ApiError, Disconnected, invalid
from service.filming import Filming, Made, order_of
from service.idempotency import Gone
from service.images import WATCH_S, Hub, counted, explain
from service.jobs import Job, Order
from service.registry import Model
from service.rows import DeadlineExceeded, EngineClosed, QueueFull
from service.studio import Event, Take
from service.video_request import VideoPlan, VideoRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")
Variant = Literal["video", "thumbnail", "spritesheet"]
LARGEST_PAGE = 100
TELL_S = 0.5
"""How often a follower hears of its place in the queue while nothing happens."""
HEARTBEAT_S = 10.0
POLL_MS = (100, 5000)
"""Bounds of what openai-poll-after-ms asks for."""
FORM_FIELDS = 64


def add_routes(web: FastAPI, hub: Hub) -> None:
    """The routes of videos. ``sync`` comes before ``{video_id}``, which would match it too."""

    @web.post("/v1/videos")
    async def create(request: Request) -> Response:
        return await create_job(hub, request)

    @web.post("/v1/videos/sync")
    async def create_at_once(request: Request) -> Response:
        return await film(hub, request)

    @web.get("/v1/videos")
    async def listed(request: Request) -> Response:
        return await list_jobs(hub, request)

    @web.get("/v1/videos/{video_id}")
    async def one(request: Request, video_id: str) -> Response:
        return await as_job(hub, await ask(hub, hub.studio.get, video_id, request))

    @web.delete("/v1/videos/{video_id}")
    async def delete(request: Request, video_id: str) -> Response:
        deleted = await ask(hub, hub.studio.delete, video_id, request)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": deleted})

    @web.post("/v1/videos/{video_id}/cancel")
    async def cancel(request: Request, video_id: str) -> Response:
        return await as_job(hub, await ask(hub, hub.studio.cancel, video_id, request))

    @web.get("/v1/videos/{video_id}/content")
    async def content(request: Request, video_id: str) -> Response:
        return await send_content(hub, request, video_id)

    @web.get("/v1/videos/{video_id}/events")
    async def events(request: Request, video_id: str) -> Response:
        job = await ask(hub, hub.studio.get, video_id, request)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        last = _last_event(request)
        return StreamingResponse(follow(hub, job, last, request), media_type="text/event-stream", headers=headers)


def owner_of(request: Request) -> str:
    state: RequestState = request.scope[STATE]
    return state.owner


async def ask(hub: Hub, question: Callable[[str, str], T], video_id: str, request: Request) -> T:
    """What the studio says of a video of this key. Raises ApiError, 503 while it is not open yet."""
    hub.registry.get(None)
    return await asyncio.to_thread(question, video_id, owner_of(request))


async def read(request: Request) -> tuple[VideoRequest, bytes]:
    """The request in a body, JSON or form, and the bytes by which a repeated one is known. Raises ApiError."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    body = await request.body()
    if kind == "application/json":
        return video_request.parse(body), body
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        text = f"content-type is {kind[:80]!r}; send application/json or multipart/form-data"
        raise ApiError(415, text, code="unsupported_media_type")
    try:
        async with request.form(max_files=1, max_fields=FORM_FIELDS) as form:
            fields: dict[str, str] = {}
            for name, value in form.multi_items():
                if name in fields:
                    raise invalid(name[: schemas.SHOWN_CHARS], f"{schemas.shown(name)} was sent twice; send it once")
                fields[name] = (value.filename or "a file") if isinstance(value, UploadFile) else value
    except MultiPartException as error:
        raise invalid(None, f"the form cannot be read: {error.message}; send it again", "invalid_form") from None
    except (UnicodeError, ValueError) as error:
        raise invalid(None, f"the form cannot be read: {error}; send it again", "invalid_form") from None
    return video_request.parse_form(fields), json.dumps(sorted(fields.items())).encode()


def plan_of(hub: Hub, asked: VideoRequest) -> tuple[Model, VideoPlan]:
    """The model of a request and what it means there. Raises ApiError."""
    model = hub.registry.get(asked.model, films=True)
    plan = video_request.plan(asked, model.bundle.manifest, hub.settings)
    hub.loras.resolve(model, plan.loras)
    tokens = model.runtime.tokenize([plan.prompt])
    if tokens.counts[0] > tokens.kept[0]:
        text = f"prompt was truncated: it has {tokens.counts[0]} tokens, {model.name} reads the first {tokens.kept[0]}"
        plan = VideoPlan.of({**plan.kept(), "warnings": [*plan.warnings, text]})
    return model, plan


async def create_job(hub: Hub, request: Request) -> Response:
    """POST /v1/videos: once per Idempotency-Key if there is one."""
    state: RequestState = request.scope[STATE]
    with counted(hub):
        asked, body = await read(request)
        model, plan = plan_of(hub, asked)
        owner, key = owner_of(request), request.headers.get("idempotency-key")

        async def work(_: Gone) -> Response:
            on_stage = tracing.of_request(hub.tracer, state.request_id, model.name, plan.steps, 1)
            return await as_job(hub, await asyncio.to_thread(hub.studio.add, model, plan, owner, on_stage))

        if key is None:
            return await work(request.is_disconnected)
        return await hub.replies.once(f"{owner} videos", key, body, work, request.is_disconnected)


async def list_jobs(hub: Hub, request: Request) -> Response:
    """OpenAI's page of jobs, the newest first unless told otherwise."""
    query = request.query_params
    for name in query:
        if name not in ("after", "limit", "order"):
            text = f"{schemas.shown(name)} is not a parameter; use after, limit, order"
            raise invalid(name[: schemas.SHOWN_CHARS], text, "unknown_parameter")
    limit, after = query.get("limit", "20"), query.get("after")
    order = query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= LARGEST_PAGE):
        raise invalid("limit", f"limit is {schemas.shown(limit)}; give a whole number from 1 to {LARGEST_PAGE}")
    if order not in ("asc", "desc"):
        raise invalid("order", f"order is {schemas.shown(order)}; give asc or desc")
    hub.registry.get(None)
    owner = owner_of(request)
    if after is not None:
        await ask(hub, hub.studio.get, after, request)

    def page() -> tuple[list[dict[str, Any]], bool]:
        way: Order = "asc" if order == "asc" else "desc"
        found, more = hub.studio.page(owner, after=after, limit=int(limit), order=way)
        return [describe(hub, job) for job in found], more

    data, more = await asyncio.to_thread(page)
    ids = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ids, "has_more": more})


async def as_job(hub: Hub, job: Job) -> Response:
    """A job, with the time after which it is worth asking again."""
    told = describe(hub, job)
    wait_ms = min(max(POLL_MS[0], round(told["eta_ms"] or 0)), POLL_MS[1])
    return JSONResponse(told, headers={} if job.finished else {"openai-poll-after-ms": str(wait_ms)})


def describe(hub: Hub, job: Job) -> dict[str, Any]:
    """OpenAI's video object with seeds, place in the queue and timings."""
    plan, take = VideoPlan.of(job.plan), hub.studio.take(job.id)
    position, eta_ms, progress = None, None, 100 if job.status == "completed" else 0
    if take is not None and not job.finished:
        position, eta_s = hub.studio.outlook(take)
        eta_ms, progress = round(eta_s * 1e3, 1), min(99, take.percent)
    failed = job.status == "failed"
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "prompt": plan.prompt,
        "seconds": plan.seconds,
        "size": f"{plan.size[0]}x{plan.size[1]}",
        "remixed_from_video_id": None,
        "error": {"code": job.error_code, "message": job.error_message} if failed else None,
        "seed": plan.seed,
        "num_frames": plan.frames,
        "fps": plan.fps,
        "steps": plan.steps,
        "output_format": plan.output_format,
        "queue_position": position,
        "eta_ms": eta_ms,
        "metrics": job.metrics or None,
        "ignored": list(plan.ignored),
        "warnings": list(plan.warnings),
    }


async def send_content(hub: Hub, request: Request, video_id: str) -> Response:
    """A file of a job. 404 until it is done and for a failed one, 410 when it has expired."""
    job = await ask(hub, hub.studio.get, video_id, request)
    variant = request.query_params.get("variant", "video")
    if variant not in get_args(Variant):
        raise invalid("variant", f"variant is {schemas.shown(variant)}; give {', '.join(get_args(Variant))}")
    if job.status != "completed":
        way_out = "see its error" if job.status == "failed" else "ask again when it is completed"
        raise ApiError(404, f"the video is {job.status}; {way_out}", code="not_found", param="video_id")
    path = hub.studio.store.path(job.id, variant)
    if job.expired or not await asyncio.to_thread(path.is_file):
        text = "the video has expired; send the request again with its seed"
        raise ApiError(410, text, code="expired", param="video_id")
    kind = {"video": str(job.plan["output_format"]), "thumbnail": "webp", "spritesheet": "jpeg"}[variant]
    headers = {
        "content-disposition": f'inline; filename="{job.id}.{kind}"',
        "cache-control": "private, max-age=3600",
        "x-content-type-options": "nosniff",
    }
    return FileResponse(path, media_type=MEDIA_TYPES[kind], headers=headers)


# --- events --------------------------------------------------------------------------------------------------------


def _last_event(request: Request) -> int:
    text = request.headers.get("last-event-id", "0").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise invalid("Last-Event-ID", f"Last-Event-ID is {schemas.shown(text)}; send the id of the last event")
    return int(text)


async def follow(hub: Hub, job: Job, last: int, request: Request) -> AsyncIterator[str]:
    """Server-sent events of a job from the event after ``last`` on, and at the end what became of it."""
    said = told = time.monotonic()
    while not job.finished:
        news = hub.studio.events(job.id, last)
        for event in news:
            yield _told(job, event)
            last, said = event.id, time.monotonic()
        take = hub.studio.take(job.id)
        if take is not None and not take.begun and time.monotonic() - told > TELL_S:
            position, eta_s = hub.studio.outlook(take)
            yield _event("queued", {"id": job.id, "queue_position": position, "eta_ms": round(eta_s * 1e3, 1)})
            said = told = time.monotonic()
        if time.monotonic() - said > HEARTBEAT_S:
            yield ": still at it\n\n"
            said = time.monotonic()
        if await request.is_disconnected():
            return
        if not news:
            await asyncio.sleep(WATCH_S)
        if hub.studio.take(job.id) is not None:
            continue  # not finished, without a look into the store
        try:
            job = await asyncio.to_thread(hub.studio.get, job.id, job.owner)
        except ApiError as error:
            yield f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n"
            return
    for event in hub.studio.events(job.id, last):
        yield _told(job, event)
    yield _event(job.status, describe(hub, job))


def _told(job: Job, event: Event) -> str:
    width, height = job.plan["size"]
    size = {"size": f"{width}x{height}"} if event.kind == "preview" else {}
    return _event(event.kind, {"id": job.id, **event.data, **size}, event.id)


def _event(kind: str, data: dict[str, Any], number: int | None = None) -> str:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: video.{kind}\ndata: {json.dumps({'type': f'video.{kind}', **data})}\n\n"


# --- at once -------------------------------------------------------------------------------------------------------


async def film(hub: Hub, request: Request) -> Response:
    """POST /v1/videos/sync: the clip as the answer; whoever leaves gives it up."""
    state: RequestState = request.scope[STATE]
    with counted(hub):
        asked, _ = await read(request)
        model, plan = plan_of(hub, asked)
        begun = time.perf_counter()
        on_stage = tracing.of_request(hub.tracer, state.request_id, model.name, plan.steps, 1)
        with TemporaryDirectory(prefix="leapfrog-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"clip.{plan.output_format}"
            filming = Filming(
                model,
                plan,
                path,
                hub.studio.pool,
                tag=state.request_id,
                owner=state.owner,
                deadline_s=plan.deadline_s,
                worn=hub.loras.resolve(model, plan.loras),
                on_stage=on_stage,
            )
            made = await _made(filming, state, request)
            data = await asyncio.to_thread(path.read_bytes)
    headers = {
        "server-timing": ", ".join(
            f"{name};dur={value:.1f}"
            for name, value in (
                ("queue", made.row.queue_ms),
                ("encode_text", made.row.encode_text_ms),
                ("denoise", made.row.denoise_ms),
                ("decode", made.row.decode_ms),
                ("encode_video", made.encode_ms),
                ("total", (time.perf_counter() - begun) * 1e3),
            )
        ),
        "x-seed": str(plan.seed),
        "x-num-frames": str(plan.frames),
        "x-fps": f"{plan.fps:g}",
        "x-video-id": f"clip_{secrets.token_hex(12)}",
    }
    if plan.warnings:
        headers["x-warning"] = plan.warnings[0]
    return Response(data, media_type=MEDIA_TYPES[plan.output_format], headers=headers)


async def _made(filming: Filming, state: RequestState, request: Request) -> Made:
    try:
        filming.start()
        waiting = asyncio.ensure_future(asyncio.wrap_future(filming.done))
        try:
            while not (await asyncio.wait({waiting}, timeout=WATCH_S))[0]:
                if await request.is_disconnected():
                    raise Disconnected
            return waiting.result()
        finally:
            waiting.cancel()
            filming.cancel()
    except (QueueFull, DeadlineExceeded, EngineClosed) as error:
        raise explain(error, filming.plan.deadline_s, state) from None
    except CancelledError:
        raise errors.cancelled() from None
    except OSError as error:
        logger.error("request %s: the clip cannot be written: %s", state.request_id, error)
        raise errors.unavailable("the server's disk is full; try again later", "storage_full") from None
    except (Disconnected, ApiError, asyncio.CancelledError):
        raise
    except Exception as error:
        raise explain(error, filming.plan.deadline_s, state) from None


def estimate(hub: Hub, asked: VideoRequest, state: RequestState) -> dict[str, Any]:
    """What a request for a video would cost and when it would be done, without doing it."""
    model, plan = plan_of(hub, asked)
    order = order_of(model, plan, owner=state.owner, tag=state.request_id)
    error: ApiError | None = None
    wished = Take(Job.new(owner=state.owner, model=model.name, plan={}, now=0.0), model, plan)
    position, eta_s = hub.studio.outlook(wished)
    try:
        hub.studio.check_place(model, plan, state.owner)
        ahead = model.engine.forecast(order)
        if not position:
            position, eta_s = ahead.position, ahead.seconds
    except QueueFull:
        pass  # a job waits in the store for its place
    except ApiError as refused:
        error = refused
    if error is None and plan.deadline_s is not None and eta_s > plan.deadline_s:
        error = errors.deadline_exceeded(plan.deadline_s, eta_s)
    return {
        "object": "estimate",
        "model": model.name,
        "admitted": error is None,
        "error": None if error is None else error.body()["error"],
        "retry_after_ms": None if error is None else int(error.headers["retry-after-ms"]),
        "queue_position": None if error is not None else position,
        "eta_ms": None if error is not None else round(eta_s * 1e3, 1),
        "cost_ms": round(model.engine.cost_s(order) * 1e3, 1),
        "steps": plan.steps,
        "size": f"{plan.size[0]}x{plan.size[1]}",
        "n": 1,
        "num_frames": plan.frames,
        "fps": plan.fps,
        "seconds": plan.seconds,
    }
