"""Where pictures come from: a bundle in this process, a service over HTTP, or a folder of files.

    source = open_source("bundles/scenes-sdxl", steps=4)
    for samples in generate(source, prompts, batch=32, cache=Path("runs/eval/samples")): ...

A source says what it is (identity); everything in identity decides the pictures, so generations are cached by the hash
of identity and samples, and a run that is started again makes only what is missing.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.bundle import Bundle, BundleError, Manifest
from eval.errors import EvalError
from eval.metrics.base import Samples
from eval.prompts import Prompt
from service.runtimes.base import Precision, RuntimeChoice

Images = NDArray[np.uint8]
CHUNK = 64
"""Samples per cached file: what an interrupted run can lose."""
_PARALLEL_REQUESTS = 8
_ATTEMPTS = 5


class Source(Protocol):
    """Makes pictures (B, 3, H, W) uint8 of prompts.

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
) -> Source:
    """A bundle's folder, an http(s) URL (with #model for one model of several), a folder of pictures, or "renders".

    runtime and precision are for bundles; see service.runtimes.choose. Raises EvalError when there is nothing there or
    it cannot make that number of steps.
    """
    if (runtime, precision) != ("auto", "float32") and not (Path(where) / "bundle.json").is_file():
        raise EvalError(
            f"{where} is no bundle and makes its pictures itself (runtime {runtime}, precision {precision}); "
            "leave these two to whoever made them"
        )
    if where.startswith(("http://", "https://")):
        return ServiceSource(where, steps)
    if where == "renders":
        return RenderSource()
    path = Path(where)
    if not path.is_dir():
        raise EvalError(f"{where} is no folder and no URL; give a bundle such as bundles/scenes-sdxl")
    if (path / "bundle.json").is_file():
        return BundleSource(path, steps, threads, batch, runtime, precision)
    if any(path.glob("*.png")):
        return FolderSource(path)
    raise EvalError(f"{where} holds neither bundle.json nor .png pictures; give a bundle such as bundles/scenes-sdxl")


class BundleSource:
    """A bundle on a runtime of this machine, without a service."""

    def __init__(
        self,
        path: Path,
        steps: int | None = None,
        threads: int | None = None,
        batch: int = 32,
        runtime: RuntimeChoice = "auto",
        precision: Precision = "float32",
    ) -> None:
        from service.runtimes import RuntimeUnavailable, open_runtime

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._options = (threads, batch, runtime, precision)
        try:
            self._bundle = Bundle.open(path)
            self.steps = _known_steps(self._bundle, steps)
            self._runtime = open_runtime(
                self._bundle, threads=threads or cores, max_batch=batch, runtime=runtime, precision=precision
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
        }
        self.about = {"path": str(self.path), "threads": capabilities.threads, "provenance": manifest.provenance}

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

    def reopened(self, path: Path) -> BundleSource:
        """Another bundle with this one's steps and options."""
        threads, batch, runtime, precision = self._options
        return BundleSource(path, self.steps, threads, batch, runtime, precision)

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
        return BundleSource(self.path, self.steps, threads, batch, runtime, precision)

    def make(self, prompts: Sequence[Prompt]) -> Images:
        from service.runtimes import generate as sample

        manifest = self.manifest
        seeds = [prompt.seed for prompt in prompts]
        texts: Any = [prompt.text for prompt in prompts]
        if manifest.task == "class-to-image":
            if any(prompt.label is None for prompt in prompts):
                raise EvalError(f"{manifest.name} takes labels and the suite has none; use a suite of world digits")
            texts = {"labels": np.array([prompt.label for prompt in prompts], dtype=np.int64)}
        return np.ascontiguousarray(sample(self._runtime, manifest, texts, seeds, self.steps).transpose(0, 3, 1, 2))


def _known_steps(bundle: Bundle, steps: int | None) -> int:
    manifest = bundle.manifest
    wanted = manifest.default_steps if steps is None else steps
    if wanted not in manifest.samplers:
        raise EvalError(
            f"--steps is {wanted} but {bundle.path} samples in {sorted(manifest.samplers)}; use one of these"
        )
    return wanted


class ServiceSource:
    """A running service as its users see it: POST /v1/images/generations, several requests at a time."""

    def __init__(self, url: str, steps: int | None = None) -> None:
        self._url, _, self._model = url.partition("#")
        self._steps = steps
        models = {model["id"]: model for model in self._request("/v1/models")["data"]}
        if self._model and self._model not in models:
            raise EvalError(f"{self._url} serves {sorted(models)}, not {self._model!r}; use one of these")
        model = models[self._model] if self._model else next(iter(models.values()))
        able = model.get("capabilities", {})
        if steps is not None and steps not in able.get("steps", [steps]):
            raise EvalError(f"--steps is {steps} but {model['id']} samples in {able['steps']}; use one of these")
        taken = steps or able.get("default_steps")
        self.name = f"{model['id']} at {self._url}, {taken or 'default'} steps"
        self.about = {"kind": "service", "url": self._url, "model": model}
        # Only a service that says which weights it runs makes pictures that may be reused.
        known = {
            "digest": model.get("digest"),
            "steps": taken,
            "runtime": able.get("runtime"),
            "runtime_version": able.get("runtime_version"),
            "precision": able.get("precision"),
            "device": able.get("device"),
        }
        self.identity: dict[str, Any] | None = {"kind": "service", **known} if all(known.values()) else None

    def make(self, prompts: Sequence[Prompt]) -> Images:
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return np.stack(list(pool.map(self._picture, prompts)))

    def _picture(self, prompt: Prompt) -> Images:
        body: dict[str, Any] = {"prompt": prompt.text, "seed": prompt.seed, "n": 1, "response_format": "b64_json"}
        body |= {"model": self._model} if self._model else {}
        body |= {"steps": self._steps} if self._steps else {}
        answer = self._request("/v1/images/generations", body)
        try:
            return _pixels(
                base64.b64decode(answer["data"][0]["b64_json"], validate=True), f"the picture of {prompt.id}"
            )
        except (KeyError, IndexError, TypeError, binascii.Error) as error:
            raise EvalError(f"{self._url} answered without a picture for {prompt.id} ({error!r})") from None

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer; a busy service, or one that restarts in the middle, is asked again with growing pauses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url.rstrip("/") + path, data, {"content-type": "application/json"})
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                detail = error.read(2000).decode(errors="replace")
                if error.code not in (429, 503) or last:
                    raise EvalError(f"{self._url}{path} answered {error.code}: {detail}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
                if last or body is None:
                    raise EvalError(f"{self._url}{path} does not answer ({error}); start it with: make serve") from None
            time.sleep(0.5 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


class FolderSource:
    """Pictures made elsewhere, one file per sample; see file_name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.name
        self.identity: dict[str, Any] | None = None
        self.about = {"kind": "folder", "path": str(path)}

    def make(self, prompts: Sequence[Prompt]) -> Images:
        paths = [self._path / file_name(prompt) for prompt in prompts]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise EvalError(f"{self._path} lacks {len(missing)} of {len(paths)} pictures, first {missing[0]}; add them")
        pictures = [_pixels(path.read_bytes(), str(path)) for path in paths]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise EvalError(f"{self._path} holds pictures of several sizes {sorted(shapes)}; make them of one size")
        return np.stack(pictures)


class RenderSource:
    """The truth: a ray-traced picture of every prompt's own scene.

    Its scores say what the judges can see: the labeller's own accuracy, the FID of a perfect model at this number of
    samples, the reward of right pictures.
    """

    name = "renders"

    def __init__(self, size: int = 64) -> None:
        from distill.data.cache import WORLD_VERSION

        self._size = size
        self.identity: dict[str, Any] | None = {"kind": "renders", "size": size, "version": WORLD_VERSION}
        self.about: dict[str, Any] = {}

    def make(self, prompts: Sequence[Prompt]) -> Images:
        from distill.data.scenes import render

        scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
        if len(scenes) != len(prompts):
            raise EvalError("prompts without scenes cannot be rendered; use a suite of world scenes")
        return np.asarray(render(scenes, self._size).numpy())


def file_name(prompt: Prompt) -> str:
    """The file of a sample in a folder of pictures."""
    return f"{prompt.id}_{prompt.seed}.png"


def write_folder(folder: Path, samples: Samples) -> None:
    """Write samples as PNG files that FolderSource reads back to the same pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, prompt in zip(samples.images, samples.prompts, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / file_name(prompt))


def _pixels(data: bytes, what: str) -> Images:
    """(3, H, W) uint8 of an encoded picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise EvalError(f"{what} cannot be decoded: {error}; make it again") from None


def generate(
    source: Source, prompts: Sequence[Prompt], *, batch: int = 32, cache: Path | None = None
) -> Iterator[Samples]:
    """Samples in order, in batches. cache: a folder for generations; None makes and times every picture again."""
    if cache is None or source.identity is None:
        for start in range(0, len(prompts), batch):
            yield _make(source, prompts[start : start + batch])
        return
    cache.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
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


def cached(cache: Path, identity: dict[str, Any], chunk: Sequence[Prompt]) -> Images | None:
    """The pictures of up to CHUNK samples, a whole chunk of a run, or None when they are not in the cache."""
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
    return images if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None
