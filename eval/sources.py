"""Where pictures and clips come from: a bundle in this process, a service over HTTP, a folder of files, the truth.

    source = open_source("bundles/scenes-sdxl", steps=4)
    for samples in generate(source, prompts, batch=32, cache=Path("runs/eval/samples")): ...

A source says what it is (identity); everything in identity decides what it makes, so generations are cached by the hash
of identity and samples, and a run that is started again makes only what is missing.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.bundle import Bundle, BundleError, Manifest
from eval.clips import read_clip, write_clip
from eval.errors import EvalError
from eval.metrics.base import Samples
from eval.prompts import Prompt
from service.runtimes.base import Precision, RuntimeChoice
from service.settings import usable_cores

Images = NDArray[np.uint8]
CHUNK, CLIP_CHUNK = 64, 16
"""Pictures, and clips, per cached file: what an interrupted run can lose."""


class Source(Protocol):
    """Makes pictures (B, 3, H, W) uint8 of prompts, or clips (B, F, 3, H, W).

    name: for people. identity: everything that decides the pictures, JSON; None when that cannot be known and nothing
    may be cached. about: more to record, JSON.
    """

    name: str
    identity: dict[str, Any] | None
    about: dict[str, Any]

    def make(self, prompts: Sequence[Prompt]) -> Images: ...


def open_source(
    where: str,
    *,
    steps: int | None = None,
    threads: int | None = None,
    batch: int = 32,
    runtime: RuntimeChoice = "auto",
    precision: Precision = "float32",
    frames: int | None = None,
) -> Source:
    """A bundle's folder, an http(s) URL (with #model for one model of several), a folder of files, or "renders".

    runtime and precision are for bundles; see service.runtimes.choose. frames: of every clip; None: pictures. Raises
    EvalError when there is nothing there or it cannot make that number of steps or frames.
    """
    if (runtime, precision) != ("auto", "float32") and not (Path(where) / "bundle.json").is_file():
        raise EvalError(
            f"{where} is no bundle and makes its pictures itself (runtime {runtime}, precision {precision}); "
            "leave these two to whoever made them"
        )
    if where.startswith(("http://", "https://")):
        from eval.remote import ServiceSource

        return ServiceSource(where, steps, frames)
    if where == "renders":
        return RenderSource(frames=frames)
    path = Path(where)
    if not path.is_dir():
        raise EvalError(f"{where} is no folder and no URL; give a bundle such as bundles/scenes-sdxl")
    if (path / "bundle.json").is_file():
        return BundleSource(path, steps, threads, batch, runtime, precision, frames)
    kind = "png" if frames is None else "mp4"
    if any(path.glob(f"*.{kind}")):
        return FolderSource(path, frames)
    raise EvalError(f"{where} holds neither bundle.json nor .{kind} files; give a bundle such as bundles/scenes-sdxl")


class BundleSource:
    """A bundle on a runtime of this machine, without a service. frames: of its clips; None: its usual number."""

    def __init__(
        self,
        path: Path,
        steps: int | None = None,
        threads: int | None = None,
        batch: int = 32,
        runtime: RuntimeChoice = "auto",
        precision: Precision = "float32",
        frames: int | None = None,
    ) -> None:
        from service.runtimes import RuntimeUnavailable, open_runtime

        self._options = (threads, batch, runtime, precision)
        try:
            self._bundle = Bundle.open(path)
            self.steps, self.frames = _known_steps(self._bundle, steps), _known_frames(self._bundle, frames)
            threads = threads or usable_cores()
            self._runtime = open_runtime(
                self._bundle, threads=threads, max_batch=batch, runtime=runtime, precision=precision
            )
        except (BundleError, RuntimeUnavailable) as error:
            raise EvalError(str(error)) from None
        self._describe()

    def _describe(self) -> None:
        manifest, capabilities = self.manifest, self._runtime.capabilities
        self.name = f"{manifest.name}, {self.steps} steps"
        self.identity: dict[str, Any] | None = {
            "kind": "bundle",
            "digest": self._bundle.digest,
            "steps": self.steps,
            "sampler": manifest.samplers[self.steps].model_dump(mode="json"),
            "guidance": manifest.guidance.model_dump(mode="json"),
            "size": manifest.sizes[0],
            "runtime": capabilities.runtime,
            "runtime_version": capabilities.version,
            "precision": capabilities.precision,
            "device": capabilities.device,
            **({"frames": self.frames} if self.frames else {}),
        }
        self.about = {"path": str(self.path), "threads": capabilities.threads, "provenance": manifest.provenance}
        self.about |= {"fps": manifest.fps} if self.frames else {}

    @property
    def manifest(self) -> Manifest:
        return self._bundle.manifest

    @property
    def path(self) -> Path:
        return self._bundle.path

    def sampled_by(self, manifest: Manifest, title: str) -> BundleSource:
        """The same weights on the same runtime, sampled as another manifest says: damage of the given title."""
        other = copy.copy(self)
        other._bundle = Bundle(self.path, manifest)
        other._describe()
        assert other.identity is not None
        other.name, other.identity["damage"] = f"{self.name}, {title}", title
        return other

    def at_steps(self, steps: int) -> BundleSource:
        """The same weights on the same runtime with another number of steps."""
        other = copy.copy(self)
        other.steps = _known_steps(self._bundle, steps)
        other._describe()
        return other

    def reopened(self, path: Path) -> BundleSource:
        """Another bundle with this one's steps and options."""
        threads, batch, runtime, precision = self._options
        return BundleSource(path, self.steps, threads, batch, runtime, precision, self.frames)

    @property
    def command(self) -> list[str]:
        """Arguments of eval.footprint that open the same bundle in the same way."""
        threads, batch, runtime, precision = self._options
        words = [str(self.path), "--steps", str(self.steps), "--batch", str(batch)]
        words += ["--runtime", runtime, "--precision", precision]
        return [*words, "--threads", str(threads or self._runtime.capabilities.threads)]

    def computed_by(self, runtime: RuntimeChoice, precision: Precision) -> BundleSource:
        """The same bundle and steps on another runtime or in another precision."""
        threads, batch, _, _ = self._options
        return BundleSource(self.path, self.steps, threads, batch, runtime, precision, self.frames)

    def make(self, prompts: Sequence[Prompt]) -> Images:
        from service.runtimes import generate as sample

        manifest = self.manifest
        seeds = [prompt.seed for prompt in prompts]
        texts: Any = [prompt.text for prompt in prompts]
        if manifest.task == "class-to-image":
            if any(prompt.label is None for prompt in prompts):
                raise EvalError(f"{manifest.name} takes labels and the suite has none; use a suite of world digits")
            texts = {"labels": np.array([prompt.label for prompt in prompts], dtype=np.int64)}
        made = sample(self._runtime, manifest, texts, seeds, self.steps, frames=self.frames)
        return np.ascontiguousarray(np.moveaxis(made, -1, -3))


def _known_steps(bundle: Bundle, steps: int | None) -> int:
    manifest = bundle.manifest
    wanted = manifest.default_steps if steps is None else steps
    if wanted not in manifest.samplers:
        raise EvalError(
            f"--steps is {wanted} but {bundle.path} samples in {sorted(manifest.samplers)}; use one of these"
        )
    return wanted


def _known_frames(bundle: Bundle, frames: int | None) -> int | None:
    """Of the clips to make; None: the bundle makes pictures."""
    manifest = bundle.manifest
    if frames is None:
        return manifest.frames[0] if manifest.frames else None
    if not manifest.frames:
        raise EvalError(f"{bundle.path} makes pictures and the suite asks for clips; use a suite without frames")
    if (frames - 1) % manifest.frame_stride:
        raise EvalError(
            f"frames is {frames} and {bundle.path} makes 1 more than a multiple of {manifest.frame_stride}; "
            f"use {1 + manifest.frame_stride * ((frames - 1) // manifest.frame_stride)}"
        )
    return frames


class FolderSource:
    """Pictures, or clips of so many frames, made elsewhere, one file per sample; see file_name."""

    def __init__(self, path: Path, frames: int | None = None) -> None:
        self._path, self._frames = path, frames
        self.name = path.name
        self.identity: dict[str, Any] | None = None
        self.about = {"kind": "folder", "path": str(path)}

    def make(self, prompts: Sequence[Prompt]) -> Images:
        paths = [self._path / file_name(prompt, clip=self._frames is not None) for prompt in prompts]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise EvalError(f"{self._path} lacks {len(missing)} of {len(paths)} files, first {missing[0]}; add them")
        made = [read_clip(p)[0] if self._frames else read_picture(p.read_bytes(), str(p)) for p in paths]
        shapes = {one.shape for one in made}
        if len(shapes) > 1:
            raise EvalError(f"{self._path} holds files of several sizes {sorted(shapes)}; make them of one size")
        return np.stack(made)


class RenderSource:
    """The truth: a ray-traced picture, or clip, of every prompt's own scene.

    Its scores say what the judges can see: the labellers' own accuracies, the distance of a perfect model at this
    number of samples, the reward of right pictures.
    """

    name = "renders"

    def __init__(self, size: int = 64, frames: int | None = None) -> None:
        from distill.data.cache import CLIP_VERSION, FPS, WORLD_VERSION

        self._size, self._frames = size, frames
        version = WORLD_VERSION if frames is None else CLIP_VERSION
        self.identity: dict[str, Any] | None = {"kind": "renders", "size": size, "version": version}
        self.identity |= {"frames": frames} if frames else {}
        self.about: dict[str, Any] = {"fps": FPS} if frames else {}

    def make(self, prompts: Sequence[Prompt]) -> Images:
        from distill.data.cache import FPS
        from distill.data.scenes import render, render_clip

        scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
        if len(scenes) != len(prompts):
            raise EvalError("prompts without scenes cannot be rendered; use a suite of world scenes or moving-scenes")
        if self._frames is None:
            return np.asarray(render(scenes, self._size).numpy())
        clips = [render_clip(scene, self._frames, self._size, fps=FPS).transpose(0, 1).numpy() for scene in scenes]
        return np.stack(clips)


def file_name(prompt: Prompt, *, clip: bool = False) -> str:
    """The file of a sample in a folder."""
    return f"{prompt.id}_{prompt.seed}.{'mp4' if clip else 'png'}"


def write_folder(folder: Path, samples: Samples, fps: float = 8.0) -> None:
    """Write samples as files that FolderSource reads back to the same pixels: PNG, or clips without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, prompt in zip(samples.images, samples.prompts, strict=True):
        if samples.frames:
            write_clip(folder / file_name(prompt, clip=True), image, fps)
        else:
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / file_name(prompt))


def read_picture(data: bytes, what: str) -> Images:
    """(3, H, W) uint8 of an encoded picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise EvalError(f"{what} cannot be decoded: {error}; make it again") from None


def generate(
    source: Source,
    prompts: Sequence[Prompt],
    *,
    batch: int = 32,
    cache: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Samples]:
    """Samples in order, in batches. cache: a folder for generations; None makes and times every sample again.

    share: (i, n) makes only batches i, i + n, …
    """
    first, step = share
    if cache is None or source.identity is None:
        for start in range(first * batch, len(prompts), step * batch):
            yield _make(source, prompts[start : start + batch])
        return
    cache.mkdir(parents=True, exist_ok=True)
    size = chunk_size(source.identity)
    for start in range(first * size, len(prompts), step * size):
        chunk = prompts[start : start + size]
        images = cached(cache, source.identity, chunk)
        if images is None:
            path = _path(cache, source.identity, chunk)
            images = np.concatenate([source.make(chunk[i : i + batch]) for i in range(0, len(chunk), batch)])
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                np.save(file, images)
            os.replace(temporary, path)
        yield Samples(images, tuple(chunk))


def _make(source: Source, prompts: Sequence[Prompt]) -> Samples:
    start = time.perf_counter()
    images = source.make(prompts)
    took = time.perf_counter() - start
    return Samples(images, tuple(prompts), np.array([took]) if len(prompts) == 1 else None, took)


def chunk_size(identity: dict[str, Any]) -> int:
    """Samples per cached file of a source."""
    return CLIP_CHUNK if identity.get("frames") else CHUNK


def cached(cache: Path, identity: dict[str, Any], chunk: Sequence[Prompt]) -> Images | None:
    """The samples of a whole chunk of a run, see chunk_size, or None when they are not in the cache."""
    return _load(_path(cache, identity, chunk), len(chunk))


def _path(cache: Path, identity: dict[str, Any], chunk: Sequence[Prompt]) -> Path:
    return cache / f"{_key(identity, chunk)}.npy"


def _key(identity: dict[str, Any], prompts: Sequence[Prompt]) -> str:
    """sha256 over what decides the pictures: the source and each sample's id, text, label and seed."""
    asked = [(prompt.id, prompt.text, prompt.label, prompt.seed) for prompt in prompts]
    return hashlib.sha256(json.dumps([identity, asked], sort_keys=True).encode()).hexdigest()


def _load(path: Path, count: int) -> Images | None:
    """A cached chunk, or None when there is none or it is not whole."""
    try:
        images = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.ndim in (4, 5) and len(images) == count else None
