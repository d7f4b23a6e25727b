"""The three forms in which pictures are sent: OpenAI's JSON, OpenAI's events with previews, and the bare file."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service.encode import Format
from service.errors import ApiError, internal, invalid
from service.idempotency import Gone
from service.images import Drawing, File, Hub, Preview, Progress, counted
from service.schemas import ImageRequest, Plan

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
STAGES = ("queue_ms", "encode_text_ms", "denoise_ms", "decode_ms")


async def as_json(drawing: Drawing, gone: Gone) -> Response:
    """OpenAI's answer, with seeds, timings and what was ignored."""
    with drawing:
        files = await drawing.files(gone)
    answer = {
        **_about(drawing, files),
        "data": [{"b64_json": base64.b64encode(file.data).decode("ascii"), "seed": file.seed} for file in files],
    }
    _log(drawing)
    return JSONResponse(answer)


async def as_file(drawing: Drawing, gone: Gone) -> Response:
    """The file itself, with the seed and the timings in headers."""
    with drawing:
        files = await drawing.files(gone)
    about = _about(drawing, files)
    timing = ", ".join(f"{name[:-3]};dur={about['metrics'][name]}" for name in (*STAGES, "encode_image_ms", "total_ms"))
    headers = {
        "server-timing": timing,
        "x-seed": str(files[0].seed),
        "x-image-id": drawing.id,
        "x-cache": about["metrics"]["cache"],
    }
    if about["warnings"]:
        headers["x-warning"] = about["warnings"][0]
    _log(drawing)
    return Response(files[0].data, media_type=f"image/{drawing.plan.output_format}", headers=headers)


def as_events(hub: Hub, drawing: Drawing, request: Request) -> Response:
    """OpenAI's event stream: previews and progress as asked for, then the picture, or an error in its place."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(hub, drawing, request), media_type="text/event-stream", headers=headers)


def wants_file(request: Request, asked: ImageRequest) -> Format | None:
    """The format of a bare file, if the Accept header asks for a picture and not for JSON.

    Raises ApiError when it contradicts the body.
    """
    kinds = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "*/*").split(",")]
    images = [kind.removeprefix("image/") for kind in kinds if kind.startswith("image/")]
    if not images or "application/json" in kinds:
        return None
    if asked.stream:
        raise invalid("stream", "stream is true and Accept asks for a picture; send one of them")
    if asked.n > 1:
        raise invalid("n", f"n is {asked.n} and Accept asks for one picture; accept application/json for more")
    if "*" in images or asked.output_format in images:
        return asked.output_format
    formats: tuple[Format, ...] = get_args(Format)
    known = next((file_format for file_format in formats if file_format in images), None)
    if known is None or "output_format" in asked.model_fields_set:
        text = f"Accept asks for image/{images[0][:20]} and output_format is {asked.output_format}; make them agree"
        raise ApiError(406, text, code="not_acceptable", param="output_format")
    return known


async def _events(hub: Hub, drawing: Drawing, request: Request) -> AsyncIterator[str]:
    """Server-sent events. An error after the first byte can only be an event; the status has been sent."""
    said = time.monotonic()
    common = _form(drawing.plan)
    try:
        with counted(hub), drawing:
            async for news in drawing.progress(request.is_disconnected):
                if news is None and time.monotonic() - said < HEARTBEAT_S:
                    continue
                said = time.monotonic()
                yield ": still at it\n\n" if news is None else _news(news, common)
            files = await drawing.files(request.is_disconnected)
            about = {**_about(drawing, files), **common, "seed": files[0].seed}
            del about["created"]
            yield _event("completed", {**about, "b64_json": base64.b64encode(files[0].data).decode("ascii")})
            _log(drawing)
    except ApiError as error:
        yield _error(error)
    except Exception:
        logger.exception("request %s failed in mid-stream", drawing.state.request_id)
        yield _error(internal(drawing.state.request_id))


def _error(error: ApiError) -> str:
    return f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n"


def _news(news: Preview | Progress, common: dict[str, Any]) -> str:
    if isinstance(news, Progress):
        return _event("progress", news._asdict())
    data = base64.b64encode(news.data).decode("ascii")
    return _event("partial_image", {**common, "b64_json": data, "partial_image_index": news.number})


def _event(name: str, data: dict[str, Any]) -> str:
    kind = f"image_generation.{name}"
    return f"event: {kind}\ndata: {json.dumps({'type': kind, 'created_at': int(time.time()), **data})}\n\n"


def _form(plan: Plan) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": plan.output_format,
        "quality": plan.quality,
        "size": f"{plan.size[0]}x{plan.size[1]}",
    }


def _about(drawing: Drawing, files: Sequence[File]) -> dict[str, Any]:
    """Everything of an answer but the pictures."""
    model, plan = drawing.model, drawing.plan
    kept, count = drawing.tokens.kept[0], drawing.tokens.counts[0]
    warnings = []
    if count > kept:
        warnings = [f"prompt was truncated: it has {count} tokens, {model.name} reads the first {kept}"]
        logger.warning("request %s: %s", drawing.state.request_id, warnings[0])
    return {
        "created": int(time.time()),
        "id": drawing.id,
        "model": model.name,
        **_form(plan),
        "usage": {
            "input_tokens": kept,
            "input_tokens_details": {"text_tokens": kept, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": kept,
        },
        "metrics": timings(plan, files, drawing.begun),
        "ignored": list(plan.ignored),
        "warnings": warnings,
    }


def timings(plan: Plan, files: Sequence[File], begun: float) -> dict[str, Any]:
    """Milliseconds per stage; with several pictures each stage is that of its slowest picture, 0 for known files."""
    made = [file.picture for file in files if file.picture is not None]
    stages = {name: max((getattr(picture, name) for picture in made), default=0.0) for name in STAGES}
    stages["encode_image_ms"] = max(file.encode_ms for file in files)
    stages["total_ms"] = (time.perf_counter() - begun) * 1e3
    known = len(files) - len(made)
    return {
        **{name: round(value, 2) for name, value in stages.items()},
        "steps": plan.steps,
        "batch": max((picture.largest_batch for picture in made), default=0),
        "cache": "off" if not plan.cache else "miss" if not known else "hit" if not made else "partial",
        "prompt_cache": made[0].prompt_cache if made else "off",
    }


def _log(drawing: Drawing) -> None:
    plan = drawing.plan
    logger.info(
        "request %s: %d x %dx%d, seed %d, %d steps, %.1f ms",
        drawing.state.request_id,
        len(plan.seeds),
        *plan.size,
        plan.seeds[0],
        plan.steps,
        (time.perf_counter() - drawing.begun) * 1e3,
    )
