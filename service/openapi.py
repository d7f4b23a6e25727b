"""The OpenAPI document of /v1: what the routes take and give, with this server's own limits and models.

Requests come from the models that check them (service.schemas.ImageRequest, service.video_request.VideoRequest), so
that the two cannot part; answers are written out here and held against real ones in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.bundle import Manifest
from service.schemas import ALIASES, ImageRequest
from service.settings import Settings
from service.video_request import VideoRequest

Schema = dict[str, Any]
VERSION = "1"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
NAMES: Schema = {"type": "array", "items": TEXT}


def document(settings: Settings, manifests: Sequence[Manifest] = ()) -> Schema:
    """OpenAPI 3.1. manifests: of the models that are served, whose names, sizes and steps it lists."""
    pictures = [manifest for manifest in manifests if not manifest.frames]
    asked, filmed = request(settings, pictures), video_request(settings, [m for m in manifests if m.frames])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Leapfrog",
            "version": VERSION,
            "description": "Few-step students behind OpenAI's images and videos API. Fields that OpenAI does not have: "
            "steps, seed, progress, priority, deadline_ms, cache, deterministic, loras; of videos num_frames, fps, "
            "output_format.",
        },
        "paths": {
            "/v1/openapi.json": {"get": _operation("getDocument", "This document", {"type": "object"})},
            "/v1/models": {"get": _operation("listModels", "Models and what they can do", _list(MODEL))},
            "/v1/models/{model}": {
                "get": _operation("getModel", "One model", MODEL, errors=(404,), path="model"),
            },
            "/v1/images/generations": {"post": _generations(asked)},
            "/v1/estimate": {
                "post": _operation(
                    "estimate",
                    "When a request would be done and what it would cost, without doing it",
                    ESTIMATE,
                    errors=(400, 404, 408, 413, 415),
                    body={"anyOf": [asked, filmed]},
                )
            },
            "/v1/images/edits": {"post": _never("editImage", "OpenAI's edits, which no model here can do", 400)},
            "/v1/realtime": {"get": _never("realtime", "A WebSocket: pictures of a prompt while it changes", 426)},
            **_loras(),
            **_videos(filmed),
            "/v1/queue": {"get": _operation("getQueue", "How much there is to do", _list(QUEUE))},
            "/v1/requests/{request_id}/cancel": {
                "post": _operation(
                    "cancelRequest",
                    "Give up a request by its x-request-id",
                    CANCELLED,
                    errors=(404,),
                    path="request_id",
                )
            },
        },
        "components": {"schemas": {"Error": ERROR}, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if settings.api_keys else [],
    }


def request(settings: Settings, manifests: Sequence[Manifest]) -> Schema:
    """The body of a request for pictures."""
    schema = ImageRequest.model_json_schema()
    properties: dict[str, Schema] = schema["properties"]
    properties["n"] |= {"maximum": settings.max_n}
    properties["response_format"]["enum"] = ["b64_json"]
    properties["background"]["enum"] = ["auto", "opaque"]
    twice = _complete(schema, settings, manifests)
    streamed = {"properties": {"stream": {"const": True}}, "required": ["stream"]}
    return {
        **schema,
        "title": "ImageRequest",
        "allOf": [*twice, {"if": streamed, "then": {"properties": {"n": {"maximum": 1}}}}],
    }


def video_request(settings: Settings, manifests: Sequence[Manifest]) -> Schema:
    """The body of a request for a video. Longer ones than there may be are refused whatever the document says."""
    schema = VideoRequest.model_json_schema()
    properties: dict[str, Schema] = schema["properties"]
    properties["input_reference"] = {"type": "null", "description": properties["input_reference"]["description"]}
    longest_s = settings.max_frames / max((m.fps for m in manifests), default=60.0)
    seconds = {"exclusiveMinimum": 0, "maximum": longest_s}
    properties["seconds"]["anyOf"] = [{"type": "number", **seconds}, {"enum": ["1", "2"]}, {"type": "null"}]
    properties["num_frames"]["anyOf"] = [
        {"type": "integer", "minimum": 1, "maximum": settings.max_frames},
        {"type": "null"},
    ]
    return {**schema, "title": "VideoRequest", "allOf": _complete(schema, settings, manifests)}


def _complete(schema: Schema, settings: Settings, manifests: Sequence[Manifest]) -> list[Schema]:
    """What requests for pictures and videos have in common; returns what may not be sent together."""
    properties: dict[str, Schema] = schema["properties"]
    properties["prompt"] |= {"minLength": 1, "maxLength": settings.max_prompt_chars, "pattern": r"\S"}
    properties["loras"]["items"] = schema.pop("$defs")["LoraWish"]
    if manifests:
        _choose(properties["model"], sorted(m.name for m in manifests))
        _choose(properties["steps"], sorted({steps for m in manifests for steps in m.samplers}))
        sizes = {f"{width}x{height}" for m in manifests for width, height in m.sizes}
        _choose(properties["size"], ["auto", *sorted(sizes)])
    for alias, name in ALIASES.items():
        properties[alias] = {**properties[name], "description": f"another name of {name}"}
    for name, entry in properties.items():
        if name not in schema["required"] and "anyOf" not in entry and entry.get("type") != "null":  # null means unset
            told: Schema = {key: entry.pop(key) for key in ("title", "description", "default") if key in entry}
            properties[name] = told | {"anyOf": [entry, {"type": "null"}]}
    return [{"not": {"required": [alias, name]}} for alias, name in ALIASES.items()]


def _videos(asked: Schema) -> Schema:
    """The paths of videos."""
    create = _operation(
        "createVideo",
        "A video job: JSON, or the form that OpenAI's client sends",
        VIDEO,
        errors=(400, 404, 408, 409, 413, 415, 429),
        body=asked,
    )
    create["parameters"] = [IDEMPOTENCY]
    at_once = _operation(
        "createVideoAtOnce",
        "The clip itself",
        {},
        errors=(400, 404, 408, 409, 413, 415, 429, 500, 504),
        body=asked,
    )
    at_once["responses"]["200"]["content"] = _files("video/mp4", "video/webm", "image/gif")
    content = _operation(
        "getVideoContent", "A file of a finished video", {}, errors=(400, 404, 410, 416), path="video_id"
    )
    kinds = ("video/mp4", "video/webm", "image/gif", "image/webp", "image/jpeg")
    content["responses"]["200"]["content"] = _files(*kinds)
    content["responses"]["206"] = {"description": "a range of it", "content": _files(*kinds, "multipart/byteranges")}
    content["parameters"].append(_query("variant", {"enum": ["video", "thumbnail", "spritesheet"]}))
    events = _operation("followVideo", "Progress and previews as they come", {}, errors=(400, 404), path="video_id")
    events["responses"]["200"]["content"] = {"text/event-stream": {"schema": TEXT}}
    last = {"type": "string", "pattern": "^[0-9]{1,18}$"}
    events["parameters"].append(
        {"name": "Last-Event-ID", "in": "header", "description": "go on after this event", "schema": last}
    )
    listed = _operation("listVideos", "Videos of this key, the newest first", VIDEOS, errors=(400, 404))
    listed["parameters"] = [
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        _query("order", {"enum": ["asc", "desc"]}),
        _query("after", {"type": "string", "minLength": 1}),
    ]
    get = _operation("getVideo", "One video job", VIDEO, errors=(404,), path="video_id")
    delete = _operation("deleteVideo", "Forget a video and its files", DELETED, errors=(404,), path="video_id")
    cancel = _operation("cancelVideo", "Give up a video and keep its record", VIDEO, errors=(404,), path="video_id")
    return {
        "/v1/videos": {"get": listed, "post": create},
        "/v1/videos/sync": {"post": at_once},
        "/v1/videos/{video_id}": {"get": get, "delete": delete},
        "/v1/videos/{video_id}/cancel": {"post": cancel},
        "/v1/videos/{video_id}/content": {"get": content},
        "/v1/videos/{video_id}/events": {"get": events},
    }


def _loras() -> Schema:
    """The paths of LoRAs."""
    add = _operation(
        "registerLora", "Register a LoRA, with an admin key", LORA, errors=(400, 404, 408, 409, 413, 415), path="name"
    )
    model = {"type": "string", "minLength": 1}
    add["parameters"].append(_query("model", model))
    add["requestBody"] = {"required": True, "content": _files("application/octet-stream")}
    forget = _operation("deleteLora", "Forget a LoRA, with an admin key", LORA_DELETED, errors=(404,), path="name")
    return {
        "/v1/loras": {"get": _operation("listLoras", "LoRAs that requests may name", _list(LORA))},
        "/v1/admin/loras/{name}": {"post": add, "delete": forget},
    }


def _never(name: str, summary: str, status: int) -> Schema:
    """An operation that is there to say what it is not."""
    found = _operation(name, summary, {}, errors=(status, 408, 413))
    del found["responses"]["200"]
    return found


def _files(*kinds: str) -> Schema:
    return {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


def _choose(entry: Schema, values: list[Any]) -> None:
    """Let a field take these values, and null where it does."""
    if "anyOf" in entry:
        entry["anyOf"] = [{"enum": values}, {"type": "null"}]
    else:
        entry["enum"] = values


def _generations(asked: Schema) -> Schema:
    found = _operation(
        "createImage",
        "Pictures of a prompt: JSON, events with stream: true, or the bare file for Accept: image/*",
        PICTURES,
        errors=(400, 404, 406, 408, 409, 413, 415, 429, 500, 504),
        body=asked,
    )
    files = _files("image/png", "image/jpeg", "image/webp")
    found["responses"]["200"]["content"] |= {"text/event-stream": {"schema": TEXT}, **files}
    found["parameters"] = [IDEMPOTENCY]
    return found


def _operation(
    name: str,
    summary: str,
    answer: Schema,
    *,
    errors: tuple[int, ...] = (),
    path: str | None = None,
    body: Schema | None = None,
) -> Schema:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    found: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": {"application/json": {"schema": answer}}},
            **{str(status): {"description": REASONS[status], **error} for status in sorted({*errors, *ALWAYS})},
        },
    }
    if path is not None:
        schema = {"type": "string", "minLength": 1}
        found["parameters"] = [{"name": path, "in": "path", "required": True, "schema": schema}]
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(item: Schema) -> Schema:
    return _object(object={"const": "list"}, data={"type": "array", "items": item})


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


REASONS = {
    400: "the request is wrong; error.param names the field",
    401: "the API key is missing or wrong",
    403: "this server answers only its own machine, or the path is for admins",
    404: "there is no such model, request or video",
    406: "no picture can be sent in the form that Accept asks for",
    408: "the body took too long to arrive",
    409: "the request was cancelled, or its Idempotency-Key came with another body",
    410: "the video has expired",
    413: "the body is too large",
    415: "the body is not JSON, nor a form where one is taken",
    416: "the range lies beyond the end of the file",
    426: "this is a WebSocket",
    429: "the queue is full; retry-after-ms says when to come back",
    500: "the server failed; its log has the request id",
    503: "no model is ready yet",
    504: "the deadline cannot be met",
}
ALWAYS = (401, 403, 503)
ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_nullable(TEXT), code=_nullable(TEXT)))
MODEL = _object(
    id=TEXT,
    object={"const": "model"},
    created=WHOLE,
    owned_by=TEXT,
    capabilities={"type": "object"},
    examples=NAMES,
    digest=TEXT,
)
ESTIMATE = _object(
    object={"const": "estimate"},
    model=TEXT,
    admitted={"type": "boolean"},
    error=_nullable(ERROR["properties"]["error"]),
    retry_after_ms=_nullable(WHOLE),
    queue_position=_nullable(WHOLE),
    eta_ms=_nullable(NUMBER),
    cost_ms=NUMBER,
    steps=WHOLE,
    size=TEXT,
    n=WHOLE,
    num_frames=WHOLE,
    fps=NUMBER,
    seconds=TEXT,
    optional=("num_frames", "fps", "seconds"),
)
QUEUE = _object(device=TEXT, replicas=WHOLE, models=NAMES, waiting=WHOLE, running=WHOLE, work_ms=NUMBER, videos=WHOLE)
CANCELLED = _object(id=TEXT, object={"const": "request.cancelled"}, cancelled={"const": True})
USAGE = _object(
    input_tokens=WHOLE,
    input_tokens_details=_object(text_tokens=WHOLE, image_tokens=WHOLE),
    output_tokens=WHOLE,
    total_tokens=WHOLE,
)
METRICS = _object(
    queue_ms=NUMBER,
    encode_text_ms=NUMBER,
    denoise_ms=NUMBER,
    decode_ms=NUMBER,
    encode_image_ms=NUMBER,
    total_ms=NUMBER,
    steps=WHOLE,
    batch=WHOLE,
    cache={"enum": ["off", "miss", "hit", "partial"]},
    prompt_cache=TEXT,
)
PICTURES = _object(
    created=WHOLE,
    id=TEXT,
    model=TEXT,
    background=TEXT,
    output_format=TEXT,
    quality=TEXT,
    size=TEXT,
    usage=USAGE,
    metrics=METRICS,
    ignored=NAMES,
    warnings=NAMES,
    data={"type": "array", "minItems": 1, "items": _object(b64_json=TEXT, seed=WHOLE)},
)
IDEMPOTENCY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key and body give the first answer again",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
VIDEO = _object(
    id=TEXT,
    object={"const": "video"},
    model=TEXT,
    status={"enum": ["queued", "in_progress", "completed", "failed"]},
    progress={"type": "integer", "minimum": 0, "maximum": 100},
    created_at=WHOLE,
    completed_at=_nullable(WHOLE),
    expires_at=_nullable(WHOLE),
    prompt=TEXT,
    seconds=TEXT,
    size=TEXT,
    remixed_from_video_id={"type": "null"},
    error=_nullable(_object(code=TEXT, message=TEXT)),
    seed=WHOLE,
    num_frames=WHOLE,
    fps=NUMBER,
    steps=WHOLE,
    output_format={"enum": ["mp4", "webm", "gif"]},
    queue_position=_nullable(WHOLE),
    eta_ms=_nullable(NUMBER),
    metrics=_nullable({"type": "object"}),
    ignored=NAMES,
    warnings=NAMES,
)
VIDEOS = _object(
    object={"const": "list"},
    data={"type": "array", "items": VIDEO},
    first_id=_nullable(TEXT),
    last_id=_nullable(TEXT),
    has_more={"type": "boolean"},
)
DELETED = _object(id=TEXT, object={"const": "video.deleted"}, deleted={"type": "boolean"})
LORA = _object(
    id=TEXT, object={"const": "lora"}, model=TEXT, created=WHOLE, rank=WHOLE, layers=WHOLE, bytes=WHOLE, digest=TEXT
)
LORA_DELETED = _object(id=TEXT, object={"const": "lora.deleted"}, deleted={"const": True})
