"""OpenAI's video request, as JSON or as the form that its client sends, and what it means for one model."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from distill.bundle import Manifest
from service import schemas
from service.clips import ClipFormat
from service.errors import invalid, unsupported
from service.scheduler import Priority
from service.schemas import LORAS, LoraWish, Quality, check_prompt, check_size, check_steps, worn_by
from service.settings import LARGEST_SEED, Settings

IGNORED = ("user", "safety_identifier")


class VideoRequest(BaseModel):
    """Body of POST /v1/videos. A description says what a field takes; error messages quote it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(description="a text")
    model: str | None = Field(default=None, description="the id of a model of GET /v1/models, or leave it out")
    seconds: int | float | str | None = Field(default=None, description="the length in seconds, a number above 0")
    size: str = Field(default="auto", description="'auto' or a size of the model such as '64x64'")
    input_reference: str | None = Field(default=None, description="nothing: the models film from text alone")
    num_frames: int | None = Field(default=None, ge=1, description="a whole number from 1, in the place of seconds")
    fps: float | None = Field(default=None, ge=1, le=60, description="frames per second from 1 to 60")
    steps: int | None = Field(default=None, description="one of the model's step counts")
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED, description="a whole number from 0 to 2**53 - 1")
    quality: Quality = Field(default="auto", description="auto, low, medium, high, xhigh, max, standard or hd")
    output_format: ClipFormat = Field(default="mp4", description="mp4, webm or gif")
    priority: Priority = Field(default="normal", description="high, normal or low")
    deadline_ms: int | None = Field(default=None, ge=1, le=86_400_000, description="milliseconds from 1 to 86400000")
    cache: bool = Field(default=True, description="true or false")
    loras: list[LoraWish] = Field(default=[], max_length=4, description=f"{LORAS}, which a form has as JSON")
    user: str | None = Field(default=None, description="a text")
    safety_identifier: str | None = Field(default=None, description="a text")


@dataclass(frozen=True)
class VideoPlan:
    """What to compute: one clip. It is kept as JSON with its job."""

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]
    frames: int
    fps: float
    output_format: ClipFormat
    priority: Priority = "normal"
    deadline_s: float | None = None
    """From the request on."""
    cache: bool = True
    loras: tuple[tuple[str, float], ...] = ()
    """Names and scales."""
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def kept(self) -> dict[str, Any]:
        """As it comes back from JSON, which has lists alone."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Self:
        lists = {name: tuple(kept[name]) for name in ("size", "ignored", "warnings")}
        worn = tuple((str(name), float(scale)) for name, scale in kept.get("loras", ()))
        return cls(**{**kept, **lists, "loras": worn})

    @property
    def seconds(self) -> str:
        """As OpenAI writes it: "4", and "2.125"."""
        return f"{self.frames / self.fps:.4g}"


def parse(body: bytes) -> VideoRequest:
    """The request in a JSON body. Raises ApiError that names the field."""
    return schemas.parse(body, VideoRequest)


def parse_form(fields: dict[str, str]) -> VideoRequest:
    """The request in a form, where every value is a text and loras are JSON. Raises ApiError that names the field."""
    given = schemas.without_aliases(dict(fields))
    loras = given.pop("loras", None)
    request = schemas.validate(given, VideoRequest, texts=True)
    if loras is None:
        return request
    listed = schemas.validate({"prompt": request.prompt, "loras": _list_in(loras)}, VideoRequest)
    return request.model_copy(update={"loras": listed.loras})


def _list_in(text: str) -> Any:
    """What a text holds as JSON; one that is none stays as it is, for the message about it."""
    try:
        return schemas.load_any(text)
    except (ValueError, RecursionError):
        return text


def plan(request: VideoRequest, manifest: Manifest, settings: Settings) -> VideoPlan:
    """What ``request`` means for a model. Raises ApiError for what the model or this server cannot do."""
    if request.input_reference is not None:
        raise unsupported("input_reference", "input_reference was sent; the models film from text alone, leave it out")
    fps = float(request.fps or manifest.fps)
    name, wanted = _frames(request, manifest, fps)
    if wanted > settings.max_frames:
        raise invalid(
            name,
            f"{name} asks for {wanted:g} frames at {fps:g} fps; give at most {settings.max_frames} frames",
            "cost_too_high",
        )
    frames = 1 + manifest.frame_stride * max(0, math.floor((wanted - 1) / manifest.frame_stride + 0.5))
    if frames > settings.max_frames:
        frames -= manifest.frame_stride
    warnings = []
    if frames not in manifest.frames:
        known = ", ".join(str(count) for count in manifest.frames)
        warnings = [f"{manifest.name} was trained on clips of {known} frames; {frames} may look worse"]
    ignored = [name for name in IGNORED if name in request.model_fields_set]
    ignored += ["seconds"] if request.num_frames is not None and request.seconds is not None else []
    ignored += ["quality"] if request.steps is not None and request.quality != "auto" else []
    return VideoPlan(
        prompt=check_prompt(request.prompt, settings, what="video"),
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        steps=check_steps(request.steps, request.quality, manifest),
        size=check_size(request.size, manifest),
        frames=frames,
        fps=fps,
        output_format=request.output_format,
        priority=request.priority,
        deadline_s=None if request.deadline_ms is None else request.deadline_ms / 1e3,
        cache=request.cache,
        loras=worn_by(request.loras),
        ignored=tuple(ignored),
        warnings=tuple(warnings),
    )


def _frames(request: VideoRequest, manifest: Manifest, fps: float) -> tuple[str, float]:
    """The field that decides the length, and how many frames it asks for."""
    if request.num_frames is not None:
        return "num_frames", request.num_frames
    if request.seconds is None:
        return "num_frames", manifest.frames[0]
    try:
        seconds = float(request.seconds)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid("seconds", f"seconds is {schemas.shown(request.seconds)}; give a number above 0")
    return "seconds", max(1.0, seconds * fps)


Task = Literal["text-to-image", "text-to-video"]
LENGTHS = frozenset({"seconds", "num_frames", "fps"})
"""Fields that no request for pictures has."""
