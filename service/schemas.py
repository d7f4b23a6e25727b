"""OpenAI's image request, checked strictly, and what it means for one model.

Unknown fields are refused with the nearest spelling, because a silently ignored ``step`` is a wrong picture. Fields of
OpenAI that change nothing here are accepted and listed in the answer under ``ignored``.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from distill.bundle import Manifest
from service.encode import Format
from service.errors import ApiError, invalid, unsupported
from service.scheduler import Priority
from service.settings import LARGEST_SEED, Settings

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
IGNORED = ("user", "safety_identifier", "moderation", "style", "background")
ALIASES = {"num_inference_steps": "steps"}
SHOWN_CHARS = 60


LORAS = 'up to 4 of GET /v1/loras, such as [{"name": "ink", "scale": 1}]'


class LoraWish(BaseModel):
    """One LoRA of GET /v1/loras and how strongly it is worn."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    scale: float = Field(default=1.0, ge=-10, le=10)


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. A description says what a field takes; error messages quote it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(description="a text")
    model: str | None = Field(default=None, description="the id of a model of GET /v1/models, or leave it out")
    n: int = Field(default=1, ge=1, description="the number of pictures, a whole number from 1")
    size: str = Field(default="auto", description="'auto' or a size of the model such as '64x64'")
    steps: int | None = Field(default=None, description="one of the model's step counts")
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED, description="a whole number from 0 to 2**53 - 1")
    quality: Quality = Field(default="auto", description="auto, low, medium, high, xhigh, max, standard or hd")
    response_format: Literal["b64_json", "url"] = Field(default="b64_json", description="b64_json")
    output_format: Format = Field(default="png", description="png, jpeg or webp")
    output_compression: int | None = Field(default=None, ge=0, le=100, description="a whole number from 0 to 100")
    background: Literal["auto", "opaque", "transparent"] = Field(default="auto", description="auto or opaque")
    stream: bool = Field(default=False, description="true or false")
    partial_images: int = Field(default=0, ge=0, le=3, description="a whole number from 0 to 3")
    progress: bool = Field(default=False, description="true or false")
    priority: Priority = Field(default="normal", description="high, normal or low")
    deadline_ms: int | None = Field(default=None, ge=1, le=3_600_000, description="milliseconds from 1 to 3600000")
    cache: bool = Field(default=True, description="true or false")
    deterministic: bool | None = Field(default=None, description="true or false")
    loras: list[LoraWish] = Field(default=[], max_length=4, description=LORAS)
    user: str | None = Field(default=None, description="a text")
    safety_identifier: str | None = Field(default=None, description="a text")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="auto or low")
    style: Literal["vivid", "natural"] | None = Field(default=None, description="vivid or natural")


@dataclass(frozen=True)
class Plan:
    """What to compute: one picture per seed, all with the same prompt, steps and size (width, height)."""

    prompt: str
    seeds: tuple[int, ...]
    steps: int
    size: tuple[int, int]
    quality: str
    output_format: Format
    compression: int | None
    ignored: tuple[str, ...]
    stream: bool = False
    partial_images: int = 0
    progress: bool = False
    """Of a stream: whether events tell the place in the queue, the time to go and the steps done."""
    priority: Priority = "normal"
    deadline_s: float | None = None
    cache: bool = True
    """Whether the encoded prompt and the files may come from a cache and stay in it."""
    exact: bool = True
    """Whether the bytes must not depend on what the picture is batched with."""
    loras: tuple[tuple[str, float], ...] = ()
    """Names and scales."""


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """The request in a JSON body. Raises ApiError that names the field."""
    data = without_aliases(load(body))
    # OpenAI declares its optional fields nullable: null means unset.
    optional = {name for name, entry in kind.model_fields.items() if not entry.is_required()}
    return validate({name: value for name, value in data.items() if value is not None or name not in optional}, kind)


def load(body: bytes) -> dict[str, Any]:
    """The object in a JSON body. Raises ApiError."""
    try:
        data = load_any(body)
    except (ValueError, RecursionError) as error:
        raise invalid(
            None, f"the body is not JSON: {error}; send an object such as {_EXAMPLE}", "invalid_json"
        ) from None
    if not isinstance(data, dict):
        raise invalid(
            None, f"the body is a JSON {type(data).__name__}; send an object such as {_EXAMPLE}", "invalid_json"
        )
    return data


def load_any(text: str | bytes) -> Any:
    """What JSON holds, without NaN and infinities. Raises ValueError, or RecursionError for what is nested too deep."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_number)


def without_aliases(data: dict[str, Any]) -> dict[str, Any]:
    """The fields under their own names. Raises ApiError for one that comes under two."""
    for alias, name in ALIASES.items():
        if alias in data:
            if name in data:
                raise invalid(alias, f"{alias} and {name} mean the same; send one of them")
            data[name] = data.pop(alias)
    return data


def _number(text: str) -> float:
    """JSON knows no whole numbers apart: 4.0 is 4."""
    found = float(text)
    return int(found) if found.is_integer() else found


def validate(given: dict[str, Any], kind: type[R], *, texts: bool = False) -> R:
    """The request of its fields; texts: of a form, where numbers are texts too.

    Raises ApiError that names the first wrong one.
    """
    for name, value in given.items():
        if name not in kind.model_fields:
            near = difflib.get_close_matches(name, [*kind.model_fields, *ALIASES], n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            text = f"{shown(name)} is not a field of this request; {hint}"
            raise invalid(name[:SHOWN_CHARS], text, "unknown_parameter")
        if isinstance(value, str) and not _is_unicode(value):
            raise invalid(name, f"{name} is {shown(value)}, which holds half a surrogate pair; send valid Unicode")
    try:
        return kind.model_validate_strings(given, strict=False) if texts else kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error.errors()[0], kind) from None


def plan(request: ImageRequest, manifest: Manifest, settings: Settings) -> Plan:
    """What ``request`` means for a model. Raises ApiError for what the model or this server cannot do."""
    _check_operations(request)
    if request.n > settings.max_n:
        raise invalid("n", f"n is {request.n}; give a whole number from 1 to {settings.max_n}")
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > LARGEST_SEED:
        raise invalid(
            "seed", f"seed is {seed} with n {request.n}; picture i uses seed + i, at most 2**53 - 1 = {LARGEST_SEED}"
        )
    ignored = [name for name in IGNORED if name in request.model_fields_set]
    if request.output_compression is not None and request.output_format == "png":
        ignored.append("output_compression")
    if request.steps is not None and request.quality != "auto":
        ignored.append("quality")
    if not request.stream:
        ignored += [name for name in ("partial_images", "progress") if name in request.model_fields_set]
    return Plan(
        prompt=check_prompt(request.prompt, settings),
        seeds=tuple(range(seed, seed + request.n)),
        steps=check_steps(request.steps, request.quality, manifest),
        size=check_size(request.size, manifest),
        quality=request.quality,
        output_format=request.output_format,
        compression=request.output_compression if request.output_format != "png" else None,
        ignored=tuple(ignored),
        stream=request.stream,
        partial_images=request.partial_images,
        progress=request.progress,
        priority=request.priority,
        deadline_s=None if request.deadline_ms is None else request.deadline_ms / 1e3,
        cache=request.cache,
        exact=settings.deterministic if request.deterministic is None else request.deterministic,
        loras=worn_by(request.loras),
    )


def worn_by(wishes: Sequence[LoraWish]) -> tuple[tuple[str, float], ...]:
    """Names and scales; raises ApiError for a name that comes twice."""
    names = [wish.name for wish in wishes]
    for index, name in enumerate(names):
        if name in names[:index]:
            text = f"loras has {shown(name)} twice; name it once, with the sum of its scales"
            raise invalid(f"loras.{index}.name", text)
    return tuple((wish.name, wish.scale) for wish in wishes)


def check_prompt(prompt: str, settings: Settings, what: str = "picture") -> str:
    """The prompt without surrounding space. Raises ApiError when it is empty or too long."""
    if len(prompt) > settings.max_prompt_chars:
        raise invalid(
            "prompt",
            f"prompt has {len(prompt)} characters; give at most {settings.max_prompt_chars}",
            "prompt_too_long",
        )
    if not prompt.strip():
        raise invalid("prompt", f"prompt is {shown(prompt)}; describe the {what} in words")
    return prompt.strip()


def steps_of_quality(quality: str, manifest: Manifest) -> int:
    """low: fewest steps; auto, medium, standard: the model's default; high, hd: the next above it; xhigh, max: most."""
    known = sorted(manifest.samplers)
    if quality == "low":
        return known[0]
    if quality in ("high", "hd"):
        return next((steps for steps in known if steps > manifest.default_steps), known[-1])
    return known[-1] if quality in ("xhigh", "max") else manifest.default_steps


def _check_operations(request: ImageRequest) -> None:
    if request.stream and request.n > 1:
        raise unsupported("n", f"n is {request.n}; a stream carries one picture, send one request per picture")
    if request.response_format == "url":
        raise unsupported("response_format", "response_format is 'url'; this server keeps no pictures, use 'b64_json'")
    if request.background == "transparent":
        raise unsupported("background", "background is 'transparent'; the models draw opaque pictures, use 'opaque'")


def check_steps(steps: int | None, quality: str, manifest: Manifest) -> int:
    """A number of steps of the model. Raises ApiError for one that it does not have."""
    if steps is None:
        return steps_of_quality(quality, manifest)
    if steps not in manifest.samplers:
        known = ", ".join(str(steps) for steps in sorted(manifest.samplers))
        raise invalid("steps", f"steps is {steps}; {manifest.name} takes {known}")
    return steps


def check_size(size: str, manifest: Manifest) -> tuple[int, int]:
    """(width, height) of the model. Raises ApiError for a size that it does not have."""
    if size == "auto":
        return manifest.sizes[0]
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    wanted = (int(match[1]), int(match[2])) if match else None
    if wanted not in manifest.sizes:
        known = ", ".join(f"{width}x{height}" for width, height in manifest.sizes)
        raise invalid("size", f"size is {shown(size)}; {manifest.name} takes auto, {known}", "unsupported_size")
    return wanted


def _explain(detail: ErrorDetails, kind: type[BaseModel]) -> ApiError:
    """Pydantic's error as ours: the field, the value seen, and what the field takes."""
    name, *inside = detail["loc"]
    # Within a list the place counts; of a union pydantic tells its own names of the branches there.
    path = ".".join(map(str, detail["loc"]))[:SHOWN_CHARS] if inside and isinstance(inside[0], int) else str(name)
    takes = kind.model_fields[str(name)].description
    if detail["type"] == "missing":
        return invalid(path, f"{path} is missing; give {takes}", "missing_required_parameter")
    return invalid(path, f"{path} is {shown(detail['input'])}; give {takes}")


def shown(value: Any) -> str:
    """A value for a message: short, and printable whatever it holds."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_EXAMPLE = '{"prompt": "a red cube"}'
