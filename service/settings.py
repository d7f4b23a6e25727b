"""Settings of the service, read once from environment variables that begin with LEAPFROG_.

LEAPFROG_BUNDLES=/srv/bundles LEAPFROG_API_KEYS=alpha,beta bentoml serve
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.runtimes.base import Precision, RuntimeChoice

PREFIX = "LEAPFROG_"
REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST_SEED = 2**53 - 1
"""The largest whole number that JavaScript keeps exactly."""


class SettingsError(ValueError):
    """An environment variable that cannot be used; the message names it."""


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_home() -> Path:
    """Where this user's programs keep their data."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "leapfrog"


class Settings(BaseModel):
    """Every limit of the service. Field ``max_n`` is the variable LEAPFROG_MAX_N, and so on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Path = Field(default=REPOSITORY / "bundles", description="a bundle, or a folder of bundles")
    api_keys: tuple[str, ...] = Field(default=(), repr=False, description="separated by commas; none: open to all")
    admin_keys: tuple[str, ...] = Field(default=(), repr=False, description="of those who may register LoRAs")
    threads: int = Field(default_factory=lambda: min(usable_cores(), 8), ge=1, le=256, description="of one graph run")
    lanes: int = Field(default=0, ge=0, description="steps at once on a processor, sharing threads; 0: one per thread")
    replicas: int = Field(default=1, ge=1, le=64, description="copies of each model, one per GPU or share of cores")
    runtime: RuntimeChoice = Field(default="auto", description="what computes; see service.runtimes.choose")
    precision: Precision = Field(default="float32", description="of the denoiser; auto: the fastest for this processor")
    max_batch: int = Field(default=8, ge=1, le=64, description="pictures in one denoising step")
    deterministic: bool = Field(default=True, description="of requests that do not say: the same bytes in any batch")
    max_queue: int = Field(default=64, ge=1, le=100_000, description="pictures waiting per replica, beyond it 429")
    max_queue_s: float = Field(default=60.0, gt=0, description="seconds of work waiting per replica, beyond it 429")
    max_key_rows: int = Field(default=32, ge=1, description="pictures of one API key per replica, beyond it 429")
    max_loras: int = Field(default=32, ge=0, description="that are registered, beyond it 409")
    max_lora_mb: int = Field(default=256, ge=1, description="of one LoRA file")
    max_sessions: int = Field(default=16, ge=0, description="realtime sessions, beyond it refused")
    session_idle_s: float = Field(default=60.0, gt=0, description="seconds after which a silent session ends")
    log: Literal["text", "json"] = Field(default="text", description="form of a line of the log")
    prompt_cache_mb: int = Field(default=64, ge=0, description="for encoded prompts; 0: none are kept")
    result_cache_mb: int = Field(default=64, ge=0, description="for finished files; 0: none are kept")
    public: bool = Field(default=False, description="answer other machines without API keys")
    max_n: int = Field(default=4, ge=1, le=10, description="pictures per request")
    max_prompt_chars: int = Field(default=2000, ge=1, le=100_000)
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    body_timeout_s: float = Field(default=20.0, gt=0, description="for a client to send its request body")
    encode_threads: int = Field(default=2, ge=1, le=64, description="that turn pixels into files")
    data: Path = Field(default_factory=data_home, description="folder of video jobs and their files")
    max_frames: int = Field(default=121, ge=1, le=10_000, description="of one clip")
    max_videos: int = Field(default=64, ge=1, description="video jobs that are not finished, beyond it 429")
    max_key_videos: int = Field(default=16, ge=1, description="the same of one API key")
    max_video_mb: int = Field(default=1024, ge=1, description="of finished videos; the oldest leave first")
    video_ttl_s: float = Field(default=86_400.0, gt=0, description="seconds for which a finished video is kept")

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @model_validator(mode="after")
    def _requests_fit_the_queue(self) -> Settings:
        for name, bound in (("max_queue", self.max_queue), ("max_key_rows", self.max_key_rows)):
            if self.max_n > bound:
                raise ValueError(f"max_n is {self.max_n} and {name} {bound}; a request must fit into the queue")
        return self

    @model_validator(mode="after")
    def _lanes_have_threads(self) -> Settings:
        if self.lanes > self.threads_each:
            raise ValueError(f"lanes is {self.lanes} and there are {self.threads_each} threads; each lane needs one")
        return self

    @property
    def lanes_each(self) -> int:
        return self.lanes or self.threads_each

    @property
    def threads_each(self) -> int:
        """Threads of one graph run: as they are set, else the usable cores shared by the replicas."""
        return self.threads if "threads" in self.model_fields_set else max(1, self.threads // self.replicas)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from LEAPFROG_* variables; an empty variable counts as unset.

        Raises SettingsError for a misspelt name, with the nearest known one, and for a value out of range. Names that
        resemble none of these settings may belong to another part of Leapfrog and are left alone.
        """
        given = {k.removeprefix(PREFIX).lower(): v for k, v in environ.items() if k.startswith(PREFIX) and v}
        for name in given.keys() - cls.model_fields.keys():
            if near := difflib.get_close_matches(name, cls.model_fields, n=1):
                raise SettingsError(f"{PREFIX}{name.upper()} is not a setting; did you mean {PREFIX}{near[0].upper()}?")
        try:
            return cls.model_validate({name: value for name, value in given.items() if name in cls.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:
                raise SettingsError(first["msg"].removeprefix("Value error, ")) from None
            name = PREFIX + str(first["loc"][0]).upper()
            seen = "" if "KEYS" in name else f" is {first['input']!r}"
            raise SettingsError(f"{name}{seen}: {first['msg'].lower()}") from None
