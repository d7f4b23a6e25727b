"""The bundle: a trained student as a directory that can be verified, served and exported. No torch.

A bundle is a diffusers folder plus ``bundle.json``, which holds everything that a runtime must know and the sha256 of
every file. Opening a bundle verifies it:

    bundle = Bundle.open("bundles/scenes-sdxl")
    bundle.manifest.samplers[4].timesteps      # (999.0, 749.0, 499.0, 249.0)
    bundle.file("step.onnx")                   # a verified path
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.sampling import Table

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"


class BundleError(Exception):
    """A bundle that cannot be trusted or read; the message names the file and the way out."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampler(_Strict):
    """One number of steps: a timestep and a row (p, q, u, y, w) per step; see distill.sampling."""

    timesteps: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _rows_match(self) -> Sampler:
        self.table()
        return self

    def table(self) -> Table:
        rows = np.array(self.rows, dtype=np.float32).reshape(len(self.rows), -1)
        return Table(np.array(self.timesteps, dtype=np.float32), rows)

    @classmethod
    def of(cls, table: Table) -> Sampler:
        rows = tuple(tuple(float(c) for c in row) for row in table.rows)
        return cls(timesteps=tuple(float(t) for t in table.timesteps), rows=rows)


class Guidance(_Strict):
    """Classifier-free guidance in the standard form u + scale·(c − u); scale 1 is none, one network call per step."""

    form: Literal["standard"] = "standard"
    scale: float = 1.0


class Target(_Strict):
    """The machine that a TensorRT engine was built for; it runs on no other."""

    architecture: str = Field(description="of the GPU: sm90, or sm80+ for what TensorRT-RTX completes when it loads")
    version: str = Field(description="of the package that built it")
    platform: str = Field(description="operating system and processor: linux-x86_64")
    source: str = Field(description="sha256 of the ONNX graph that it was built from")
    shapes: dict[str, tuple[tuple[int, ...], ...]] = Field(description="least, usual and greatest shape by input")


class Engine(_Strict):
    """One compiled graph: what it is, for which runtime, and how closely it reproduces torch."""

    graph: Literal["text_encoder", "step", "decoder", "decoder_next"]
    runtime: Literal["onnx", "tensorrt", "tensorrt-rtx"] = "onnx"
    file: str
    opset: int
    precision: str = "float32"
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    parity: dict[str, float] = Field(description="the worst of each number; empty for what was built, not executed")
    kept: tuple[str, ...] = Field(default=(), description="parts in float32 although precision is another")
    status: Literal["verified", "built", "candidate"] = Field(
        default="verified", description="built: never executed; candidate: for its scores to accept"
    )
    target: Target | None = Field(default=None, description="None: runs on any machine")
    latency_ms: dict[int, float] = Field(default={}, description="of one call by rows, on the machine of the export")


class Manifest(_Strict):
    """The contents of bundle.json."""

    schema_version: int = SCHEMA_VERSION
    name: str
    family: str
    task: Literal["text-to-image", "class-to-image", "text-to-video"]
    prediction: Literal["epsilon", "x0", "v", "flow"]
    latent_channels: int
    latent_stride: int = Field(description="pixels per latent along height and width; 1 for pixel space")
    sizes: tuple[tuple[int, int], ...] = Field(description="(width, height) pairs in pixels")
    frames: tuple[int, ...] = Field(
        default=(), description="of a clip as trained, the usual number first; none: pictures"
    )
    frame_stride: int = Field(default=1, ge=1, description="frames per latent frame, but for a clip's first")
    fps: float = Field(default=0.0, ge=0, description="frames per second as trained; 0: pictures")
    max_tokens: int | None = Field(default=None, description="prompt length in tokens with begin and end; None: labels")
    samplers: dict[int, Sampler] = Field(description="by number of steps")
    default_steps: int
    guidance: Guidance = Guidance()
    preview: tuple[tuple[float, float, float], ...] = Field(
        description="rows of a linear map from latent channels, then a constant, to RGB in [-1, 1]"
    )
    examples: tuple[str, ...] = ()
    provenance: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    engines: tuple[Engine, ...] = ()
    files: dict[str, str] = Field(default={}, description="sha256 by path relative to the bundle, / as separator")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version}; this version of Leapfrog reads {SCHEMA_VERSION}"
            )
        if self.default_steps not in self.samplers:
            raise ValueError(f"default_steps is {self.default_steps}; samplers has {sorted(self.samplers)}")
        for steps, sampler in self.samplers.items():
            if len(sampler.timesteps) != steps:
                raise ValueError(f"samplers[{steps}] has {len(sampler.timesteps)} timesteps; give {steps}")
        wrong = [count for count in self.frames if count < 1 or (count - 1) % self.frame_stride]
        if wrong or (self.frames and not self.fps):
            raise ValueError(
                f"frames is {list(self.frames)} at {self.fps:g} fps; give numbers that are 1 more than a multiple of "
                f"{self.frame_stride}, and frames per second"
            )
        if len(self.preview) != self.latent_channels + 1:
            raise ValueError(
                f"preview has {len(self.preview)} rows; give latent_channels + 1 = {self.latent_channels + 1}"
            )
        return self

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: 17 frames at stride 4 are 5."""
        return (frames - 1) // self.frame_stride + 1

    def latent_shape(self, size: tuple[int, int] | None = None, frames: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of the latents of a picture, (C, f, h, w) of a clip.

        size: (width, height) in pixels; None: the first of sizes, and the first of frames.
        """
        width, height = size or self.sizes[0]
        clip = (self.latent_frames(frames or self.frames[0]),) if self.frames else ()
        return (self.latent_channels, *clip, height // self.latent_stride, width // self.latent_stride)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: where it lies and what its manifest says."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read bundle.json and check the sha256 of every file it lists.

        Raises BundleError that names the file when one is missing, truncated or altered.
        """
        root = Path(path)
        manifest_path = root / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(f"{root} has no {MANIFEST}; give the folder of a bundle, such as bundles/scenes-sdxl")
        try:
            manifest = Manifest.model_validate_json(manifest_path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise BundleError(f"{manifest_path}: {where}: {first['msg']}; write the bundle again") from None
        for name, digest in manifest.files.items():
            _verify(root, name, digest)
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """The path of a listed file. Raises BundleError for a file that the manifest does not vouch for."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path / name} is not listed in {MANIFEST}; write the bundle again")
        return self.path / name

    def engines(self, graph: str, runtime: str = "onnx", precision: str = "float32") -> tuple[Engine, ...]:
        """All engines of a graph for a runtime: several where they were built for several machines."""
        asked = (graph, runtime, precision)
        return tuple(e for e in self.manifest.engines if (e.graph, e.runtime, e.precision) == asked)

    def engine(self, graph: str, runtime: str = "onnx", precision: str = "float32") -> Engine:
        """The engine of a graph for a runtime. Raises BundleError when the bundle was not exported to it."""
        for engine in self.engines(graph, runtime, precision):
            return engine
        reduced = "" if precision == "float32" else f" --precision {precision}"
        raise BundleError(
            f"{self.path} has no {runtime} engine for {graph!r}{reduced and f' in {precision}'}; "
            f"run: python -m distill.export {self.path} --to {runtime}{reduced}"
        )

    @property
    def digest(self) -> str:
        """sha256 over the listed files' names and hashes: the identity of what computes the pictures."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.manifest.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _verify(root: Path, name: str, digest: str) -> None:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{root / MANIFEST} lists {name!r}, which lies outside the bundle; write the bundle again")
    if not path.is_file():
        raise BundleError(f"{path} is missing; restore it or write the bundle again")
    found = sha256(path)
    if found != digest:
        size = path.stat().st_size
        raise BundleError(
            f"{path} was altered or truncated ({size} bytes, sha256 {found[:12]}…, expected {digest[:12]}…); "
            "restore it or write the bundle again"
        )


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> Bundle:
    """Hash every file under ``path``, write bundle.json last and atomically, and return the bundle."""
    root = Path(path)
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    files = {name: sha256(root / name) for name in names if name != MANIFEST and not name.endswith(".tmp")}
    complete = manifest.model_copy(update={"files": files})
    text = json.dumps(complete.model_dump(mode="json"), indent=2, sort_keys=False) + "\n"
    temporary = root / (MANIFEST + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, root / MANIFEST)
    return Bundle(root, complete)
