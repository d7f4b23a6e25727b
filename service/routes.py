"""The HTTP interface under /v1, in the shapes of OpenAI's images API, and the page at /."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from service import errors, metrics, schemas
from service.edge import STATE, RequestState, translate
from service.encode import EncodePool
from service.engine import EngineClosed, Order, Picture, QueueFull
from service.errors import ApiError
from service.registry import Model, Registry
from service.schemas import Plan
from service.settings import LARGEST_SEED, Settings

logger = logging.getLogger(__name__)
T = TypeVar("T")
WATCH_S = 0.05
"""How often a waiting request looks whether its client is still there."""


class Disconnected(Exception):
    """The client has gone; its pictures were given up."""


@dataclass
class Hub:
    """What the routes share."""

    settings: Settings
    registry: Registry
    pool: EncodePool


def build(hub: Hub) -> FastAPI:
    """The FastAPI application that BentoML mounts at /."""
    web = FastAPI(title="Leapfrog", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("service").joinpath("page.html").read_text(encoding="utf-8")

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
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @web.get("/v1/models")
    async def models() -> JSONResponse:
        hub.registry.get(None)
        return JSONResponse({"object": "list", "data": [describe(model, hub) for model in hub.registry.all()]})

    @web.get("/v1/models/{name}")
    async def one_model(name: str) -> JSONResponse:
        return JSONResponse(describe(hub.registry.get(name), hub))

    @web.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json":
            text = f"content-type is {content_type[:80]!r}; send application/json"
            raise ApiError(415, text, code="unsupported_media_type")
        body = await request.body()
        return JSONResponse(await counted(hub, lambda: images(hub, request, body)))

    return web


PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
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
            "max_n": hub.settings.max_n,
            "max_prompt_chars": hub.settings.max_prompt_chars,
            "max_prompt_tokens": None if manifest.max_tokens is None else manifest.max_tokens - 2,
            "output_formats": ["png", "jpeg", "webp"],
            "seed_max": LARGEST_SEED,
            "deterministic": True,
            "runtime": able.runtime,
            "runtime_version": able.version,
            "precision": able.precision,
            "device": able.device,
            "threads": able.threads,
            "batch_sizes": list(able.batch_sizes),
            "step_ms": list(able.step_ms),
        },
        "examples": list(manifest.examples),
        "digest": model.bundle.digest,
    }


async def counted(hub: Hub, work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` and count how it ended, whatever that was."""
    outcome, start, label = "error", time.perf_counter(), hub.registry.label
    try:
        result = await work()
        outcome = "ok"
        metrics.REQUEST_SECONDS.labels(label).observe(time.perf_counter() - start)
        return result
    except Disconnected:
        outcome = "disconnected"
        raise ApiError(408, "the client closed the connection", code="client_disconnected") from None
    except ApiError as error:
        outcome = {429: "rejected", 503: "unavailable"}.get(error.status, "invalid" if error.status < 500 else "error")
        raise
    finally:
        metrics.REQUESTS.labels(label, outcome).inc()


async def images(hub: Hub, request: Request, body: bytes) -> dict[str, Any]:
    """OpenAI's answer to a request for pictures."""
    asked = schemas.parse(body)
    model = hub.registry.get(asked.model)
    plan = schemas.plan(asked, model.bundle.manifest, hub.settings)
    start, request_id = time.perf_counter(), request.scope[STATE].request_id
    tokens = model.runtime.tokenize([plan.prompt])
    pictures = await pictures_of(model, plan, request)
    encoded = await asyncio.gather(
        *(hub.pool.encode(picture.pixels, plan.output_format, plan.compression) for picture in pictures)
    )
    for _, milliseconds in encoded:
        metrics.stage(model.name, "encode_image", milliseconds)
    answer = {
        "created": int(time.time()),
        "id": f"img_{secrets.token_hex(12)}",
        "model": model.name,
        "background": "opaque",
        "output_format": plan.output_format,
        "quality": plan.quality,
        "size": f"{plan.size[0]}x{plan.size[1]}",
        "data": [
            {"b64_json": base64.b64encode(data).decode("ascii"), "seed": picture.seed}
            for picture, (data, _) in zip(pictures, encoded, strict=True)
        ],
        "usage": {
            "input_tokens": tokens.kept[0],
            "input_tokens_details": {"text_tokens": tokens.kept[0], "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": tokens.kept[0],
        },
        "metrics": timings(plan, pictures, [milliseconds for _, milliseconds in encoded], start),
        "ignored": list(plan.ignored),
        "warnings": [],
    }
    if tokens.counts[0] > tokens.kept[0]:
        text = f"prompt was truncated: it has {tokens.counts[0]} tokens, {model.name} reads the first {tokens.kept[0]}"
        answer["warnings"] = [text]
        logger.warning("request %s: %s", request_id, text)
    logger.info(
        "request %s: %d x %s, seed %d, %d steps, %.1f ms",
        request_id,
        len(pictures),
        answer["size"],
        plan.seeds[0],
        plan.steps,
        (time.perf_counter() - start) * 1e3,
    )
    return answer


def timings(plan: Plan, pictures: Sequence[Picture], encode_ms: Sequence[float], start: float) -> dict[str, Any]:
    """Milliseconds per stage; with several pictures each stage is that of its slowest picture."""
    stages = {
        "queue_ms": max(p.queue_ms for p in pictures),
        "encode_text_ms": max(p.encode_text_ms for p in pictures),
        "denoise_ms": max(p.denoise_ms for p in pictures),
        "decode_ms": max(p.decode_ms for p in pictures),
        "encode_image_ms": max(encode_ms),
        "total_ms": (time.perf_counter() - start) * 1e3,
    }
    batch = max(p.largest_batch for p in pictures)
    return {**{name: round(value, 2) for name, value in stages.items()}, "steps": plan.steps, "batch": batch}


async def pictures_of(model: Model, plan: Plan, request: Request) -> list[Picture]:
    """The pictures of a plan, in the order of its seeds.

    Raises ApiError (429 full, 503 closing, 500 failed) and Disconnected; in each case no row stays behind.
    """
    state: RequestState = request.scope[STATE]
    try:
        rows = model.engine.submit(Order(model.name, plan.prompt, plan.seeds, plan.steps, plan.size, state.request_id))
    except QueueFull as full:
        raise errors.queue_full(full.waiting, full.retry_after_s) from None
    except EngineClosed as closed:
        raise errors.unavailable(str(closed), "draining", retry_after_s=5) from None
    waiting = asyncio.gather(*(asyncio.wrap_future(row) for row in rows))
    try:
        while not (await asyncio.wait({waiting}, timeout=WATCH_S))[0]:
            if await request.is_disconnected():
                raise Disconnected
        return list(waiting.result())
    except EngineClosed as closed:
        raise errors.unavailable(str(closed), "draining", retry_after_s=5) from None
    except (Disconnected, asyncio.CancelledError):
        raise
    except Exception:
        # The engine has logged what happened, with this request id.
        raise errors.internal(state.request_id) from None
    finally:
        waiting.cancel()
        for row in rows:
            row.cancel()
