"""The HTTP interface under /v1, in the shapes of OpenAI's images API, and the page at /."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from importlib.resources import files
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from service import answers, loras, openapi, realtime, schemas, video_request, videos
from service.clips import ClipFormat
from service.edge import STATE, RequestState, translate
from service.encode import Format
from service.errors import ApiError, deadline_exceeded, unsupported
from service.fleet import Engines
from service.idempotency import Gone
from service.images import Drawing, Hub, counted, explain, order_of
from service.registry import Model
from service.rows import QueueFull
from service.scheduler import Priority
from service.schemas import ImageRequest
from service.settings import LARGEST_SEED
from service.video_request import LENGTHS

__all__ = ["Hub", "build"]


def build(hub: Hub) -> FastAPI:
    """The FastAPI application that BentoML mounts at /."""
    web = FastAPI(title="Leapfrog", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("service").joinpath("page.html").read_text(encoding="utf-8")
    page_headers = headers_of(page)

    @web.exception_handler(ApiError)
    async def own_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @web.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> JSONResponse:
        state: RequestState = request.scope[STATE]
        translated = translate(error.status_code, str(error.detail).encode(), state, request.method)
        translated.headers |= error.headers or {}
        return translated.response()

    @web.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @web.get("/v1/openapi.json")
    async def described() -> JSONResponse:
        return JSONResponse(openapi.document(hub.settings, [model.bundle.manifest for model in hub.registry.all()]))

    @web.get("/v1/models")
    async def models() -> JSONResponse:
        hub.registry.get(None)
        return JSONResponse({"object": "list", "data": [describe(model, hub) for model in hub.registry.all()]})

    @web.get("/v1/models/{name}")
    async def one_model(name: str) -> JSONResponse:
        return JSONResponse(describe(hub.registry.get(name), hub))

    @web.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await generate(hub, request)

    @web.post("/v1/estimate")
    async def estimated(request: Request) -> JSONResponse:
        body = await json_body(request)
        state: RequestState = request.scope[STATE]
        asked = schemas.load(body)
        if films(hub, asked):
            return JSONResponse(await asyncio.to_thread(videos.estimate, hub, video_request.parse(body), state))
        return JSONResponse(estimate(hub, schemas.parse(body, ImageRequest), state))

    @web.get("/v1/queue")
    async def queue() -> JSONResponse:
        hub.registry.get(None)
        data = [describe_queue(hub, engine) for engine in hub.registry.engines]
        return JSONResponse({"object": "list", "data": data})

    videos.add_routes(web, hub)
    loras.add_routes(web, hub.loras)
    realtime.add_routes(web, hub)

    @web.post("/v1/images/edits")
    async def edits() -> None:
        text = "the models draw from text alone, see capabilities in GET /v1/models; use POST /v1/images/generations"
        raise unsupported("image", text)

    @web.post("/v1/requests/{request_id}/cancel")
    async def cancel(request: Request, request_id: str) -> JSONResponse:
        return JSONResponse(give_up(hub, request.scope[STATE].owner, request_id))

    return web


def headers_of(page: str) -> dict[str, str]:
    """The page may run its own script and style and nothing else: both are known by their hashes."""

    def own(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return {
        "cache-control": "no-cache",
        "content-security-policy": f"default-src 'none'; style-src {own('style')}; script-src {own('script')}; "
        "img-src data: blob:; media-src blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def describe(model: Model, hub: Hub) -> dict[str, Any]:
    """OpenAI's model object with what the model can do."""
    manifest, able = model.bundle.manifest, model.runtime.capabilities
    return {
        "id": model.name,
        "object": "model",
        "created": model.loaded,
        "owned_by": "leapfrog",
        "capabilities": {
            "task": manifest.task,
            "family": manifest.family,
            "sizes": [f"{width}x{height}" for width, height in manifest.sizes],
            "steps": sorted(manifest.samplers),
            "default_steps": manifest.default_steps,
            "max_n": 1 if model.films else hub.settings.max_n,
            "max_prompt_chars": hub.settings.max_prompt_chars,
            "max_prompt_tokens": able.prompt_tokens,
            "output_formats": list(get_args(ClipFormat if model.films else Format)),
            "seed_max": LARGEST_SEED,
            "deterministic": True,
            "loras": able.loras,
            "image_edits": False,
            "realtime": not model.films,
            "stream": True,
            "max_partial_images": 0 if model.films else 3,
            **(describe_clips(model, hub) if model.films else {}),
            "priorities": list(get_args(Priority)),
            "runtime": able.runtime,
            "runtime_version": able.version,
            "precision": able.precision,
            "device": able.device,
            "fallback": able.fallback or None,
            "measured": able.measured or None,
            "threads": able.threads,
            "lanes": model.engine.lane_count(model.name),
            "batch_sizes": list(able.batch_sizes),
            "step_ms": list(able.step_ms),
            "loose_batch_sizes": list(able.loose_sizes),
        },
        "examples": list(manifest.examples),
        "digest": model.digest,
    }


def describe_clips(model: Model, hub: Hub) -> dict[str, Any]:
    """What a model of videos can do beyond one of pictures."""
    manifest = model.bundle.manifest
    return {
        "frames": list(manifest.frames),
        "frame_stride": manifest.frame_stride,
        "max_frames": hub.settings.max_frames,
        "fps": manifest.fps,
    }


async def json_body(request: Request) -> bytes:
    """The body of a request that says it is JSON, or says nothing."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        text = f"content-type is {content_type[:80]!r}; send application/json"
        raise ApiError(415, text, code="unsupported_media_type")
    return await request.body()


async def generate(hub: Hub, request: Request) -> Response:
    """POST /v1/images/generations: JSON, or a stream, or the bare file; once per Idempotency-Key if there is one."""
    body = await json_body(request)
    state: RequestState = request.scope[STATE]
    with counted(hub) as count:
        asked = schemas.parse(body, ImageRequest)
        file_format = answers.wants_file(request, asked)
        key = request.headers.get("idempotency-key")
        if asked.stream and key is not None:
            raise unsupported("stream", "stream is true with an Idempotency-Key; a stream cannot be given twice")
        if asked.stream:
            drawing = begin(hub, asked, state)
            count.postponed = True
            return answers.as_events(hub, drawing, request)
        answer = answers.as_json if file_format is None else answers.as_file

        async def work(gone: Gone) -> Response:
            return await answer(begin(hub, asked, state, file_format), gone)

        if key is None:
            return await work(request.is_disconnected)
        return await hub.replies.once(state.owner, key, body, work, request.is_disconnected)


def begin(hub: Hub, asked: ImageRequest, state: RequestState, file_format: Format | None = None) -> Drawing:
    """Check a request against its model and hand it to the engine. Raises ApiError."""
    if file_format is not None:
        asked = asked.model_copy(update={"output_format": file_format})
    model = hub.registry.get(asked.model, films=False)
    return Drawing(hub, model, schemas.plan(asked, model.bundle.manifest, hub.settings), state)


def films(hub: Hub, asked: dict[str, Any]) -> bool:
    """Whether a request for an estimate is about a video: by its model, else by its fields."""
    models = {model.name: model.films for model in hub.registry.all()}
    name = asked.get("model")
    if isinstance(name, str) and name in models:
        return models[name]
    return any(models.values()) and (not LENGTHS.isdisjoint(asked) or all(models.values()))


def estimate(hub: Hub, asked: ImageRequest, state: RequestState) -> dict[str, Any]:
    """What a request for pictures would cost and when it would be done, without doing it."""
    model = hub.registry.get(asked.model, films=False)
    plan = schemas.plan(asked, model.bundle.manifest, hub.settings)
    order = order_of(model, plan, state, plan.seeds, hub.loras.resolve(model, plan.loras))
    error: ApiError | None = None
    eta_ms, position = None, None
    try:
        ahead = model.engine.forecast(order)
        eta_ms = round(model.engine.expected_s(model.name, ahead.seconds) * 1e3, 1)
        position = ahead.position
        if plan.deadline_s is not None and ahead.seconds > plan.deadline_s:
            error = deadline_exceeded(plan.deadline_s, ahead.seconds)
    except QueueFull as full:
        error = explain(full, plan.deadline_s, state)
    return {
        "object": "estimate",
        "model": model.name,
        "admitted": error is None,
        "error": None if error is None else error.body()["error"],
        "retry_after_ms": None if error is None else int(error.headers["retry-after-ms"]),
        "queue_position": position,
        "eta_ms": eta_ms,
        "cost_ms": round(model.engine.cost_s(order) * 1e3, 1),
        "steps": plan.steps,
        "size": f"{plan.size[0]}x{plan.size[1]}",
        "n": len(plan.seeds),
    }


def describe_queue(hub: Hub, engine: Engines) -> dict[str, Any]:
    """How much there is to do on a device."""
    waiting, running, work_s = engine.load()
    return {
        "device": engine.device,
        "replicas": engine.replicas,
        "models": engine.models,
        "waiting": waiting,
        "running": running,
        "work_ms": round(work_s * 1e3, 1),
        "videos": hub.studio.unfinished(engine),
    }


def give_up(hub: Hub, owner: str, request_id: str) -> dict[str, Any]:
    """Cancel what a request of this owner is waiting for; its rows leave at their next step."""
    drawings = hub.running.get((owner, request_id), [])
    if not drawings:
        text = f"no request {request_id[:64]!r} is running; its id is the x-request-id that you sent with it"
        raise ApiError(404, text, code="not_found")
    for drawing in drawings:
        drawing.cancel()
    return {"id": request_id, "object": "request.cancelled", "cancelled": True}
