"""The loaded models and the state of the service: loading, ready, failed or draining.

Bundles are verified and loaded in a thread, so that the port answers from the first moment; whoever asks meanwhile
gets 503 and the reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.bundle import MANIFEST, Bundle, BundleError
from service import metrics
from service.engine import Engine
from service.errors import ApiError, unavailable, unsupported
from service.fleet import Engines, Fleet
from service.jobs import StoreError
from service.runtimes import Runtime, RuntimeUnavailable, open_lanes, open_runtime
from service.settings import Settings

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "draining"]
SERVED_TASKS = ("text-to-image", "text-to-video")


@dataclass(frozen=True)
class Model:
    """One served bundle: its manifest, its runtime's abilities and its engine."""

    bundle: Bundle
    runtime: Runtime
    """Of several replicas the first."""
    engine: Engines
    digest: str
    """Of the bundle: the identity of what computes the pictures."""
    loaded: int
    """Unix seconds."""

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def films(self) -> bool:
        """Whether it makes clips, not pictures."""
        return self.bundle.manifest.task == "text-to-video"


class Registry:
    """All models of the service. ``state`` and ``reason`` are what /readyz tells."""

    def __init__(self, settings: Settings, broken: str | None = None) -> None:
        """``broken``: a reason why nothing can be served at all, such as an unusable setting."""
        self.settings = settings
        self.state: State = "failed" if broken else "loading"
        self.reason = broken or "the models are being loaded"
        self._models: dict[str, Model] = {}
        self._engines: dict[str, Engines] = {}
        self._runtimes: list[Runtime] = []
        self._closing = threading.Event()
        if broken:
            logger.error("not serving: %s", broken)

    def load(self, then: Callable[[], None] = lambda: None) -> None:
        """Verify and load every bundle; on a failure say which file is wrong and serve nothing. Runs in a thread.

        then: what else must be done before anything is served; it may raise StoreError.
        """
        if self.state == "failed":
            return
        try:
            for path in find_bundles(self.settings.bundles):
                if not self._closing.is_set():
                    self._load_one(path)
            if not self._models:
                raise BundleError(f"{self.settings.bundles} has no bundle that draws or films from text; add one")
            then()
        except (BundleError, RuntimeUnavailable, StoreError) as error:
            self.fail(str(error))
        except Exception as error:
            logger.exception("loading failed")
            self.fail(f"loading failed: {error}")
        else:
            if not self._closing.is_set():
                self.state, self.reason = "ready", ""
                logger.info("ready: %s", ", ".join(self._models))

    def get(self, name: str | None, *, films: bool | None = None) -> Model:
        """The named model, or the first one; films: that makes clips, or pictures.

        Raises ApiError: 503 while there is none to serve, 404 for another name, 400 for a model of the other kind.
        """
        if self.state != "ready":
            code = "model_loading" if self.state == "loading" else self.state
            raise unavailable(f"not ready: {self.reason}", code, retry_after_s=2 if self.state == "loading" else 30)
        if name is None:
            found = next((model for model in self._models.values() if films in (None, model.films)), None)
            if found is None:
                raise unsupported("model", f"no model of this server makes {_what(films)}; see GET /v1/models")
            return found
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404, f"model is {name[:80]!r}; this server has {known}", code="model_not_found", param="model"
            )
        model = self._models[name]
        if films is not None and films != model.films:
            way = "/v1/videos" if model.films else "/v1/images/generations"
            raise unsupported("model", f"model is {name!r}, which makes {_what(model.films)}; use POST {way}")
        return model

    def get_loaded(self, name: str) -> Model:
        """Raises KeyError."""
        return self._models[name]

    def all(self) -> list[Model]:
        return list(self._models.values())

    @property
    def engines(self) -> list[Engines]:
        """One per kind of device; several replicas count as one."""
        return list(self._engines.values())

    @property
    def label(self) -> str:
        """The default model's name, for metrics of requests that may not reach a model."""
        return next(iter(self._models), "none")

    @property
    def alive(self) -> bool:
        """False when only a restart can help: loading failed or an engine's thread has died."""
        return self.state == "draining" or (self.state != "failed" and all(engine.alive for engine in self.engines))

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.alive

    def measure_memory(self) -> None:
        """Set the gauge of memory. Runtimes of one GPU in one process tell the same."""
        held: dict[str, dict[str, int]] = {}
        for runtime in self._runtimes:
            held.setdefault(runtime.capabilities.device, {}).update(runtime.memory())
        metrics.memory(held)

    def close(self) -> None:
        """Stop admitting, finish what runs."""
        self._closing.set()
        if self.state != "failed":
            self.state, self.reason = "draining", "the server is shutting down"
        for engine in self.engines:
            engine.close()

    def _load_one(self, path: Path) -> None:
        start = time.perf_counter()
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        if manifest.task not in SERVED_TASKS:
            logger.warning("%s: task %s is not served, skipped", path, manifest.task)
            return
        if manifest.name in self._models:
            raise BundleError(
                f"{path} has the name {manifest.name!r} of {self._models[manifest.name].bundle.path}; rename one"
            )
        runtimes = [self._open(bundle, replica) for replica in range(self.settings.replicas)]
        able = runtimes[0].capabilities
        lanes = [open_lanes(bundle, runtime, self.settings.lanes_each, self.settings.max_batch) for runtime in runtimes]
        engine = self._engine(able.device.partition(":")[0], max(1, len(lanes[0])))
        if isinstance(engine, Fleet):
            engine.add(manifest.name, runtimes, manifest, lanes)
        else:
            engine.add(manifest.name, runtimes[0], manifest, lanes[0])
        self._runtimes += runtimes
        self._models[manifest.name] = Model(bundle, runtimes[0], engine, bundle.digest, int(time.time()))
        logger.info(
            "loaded %s from %s in %.1f s: %d x %s in %s, %d threads, batches of %s take %s ms per step, %d at a time",
            manifest.name,
            path,
            time.perf_counter() - start,
            len(runtimes),
            able.runtime,
            able.precision,
            able.threads,
            able.batch_sizes,
            able.step_ms,
            engine.lane_count(manifest.name),
        )

    def _open(self, bundle: Bundle, replica: int) -> Runtime:
        settings = self.settings
        return open_runtime(
            bundle,
            threads=settings.threads_each,
            max_batch=settings.max_batch,
            runtime=settings.runtime,
            precision=settings.precision,
            replica=replica,
        )

    def _engine(self, device: str, lanes: int) -> Engines:
        """The engine of a kind of device, or the engines of its replicas: all its models share one queue.

        The first model says whether there are lanes.
        """
        if device not in self._engines:
            count = self.settings.replicas
            engines = [self._new_engine(f"{device}:{i}" if count > 1 else device, lanes) for i in range(count)]
            self._engines[device] = Fleet(device, engines) if count > 1 else engines[0]
        return self._engines[device]

    def _new_engine(self, device: str, lanes: int) -> Engine:
        settings = self.settings
        return Engine(
            device,
            lanes=lanes,
            max_queue=settings.max_queue,
            max_queue_s=settings.max_queue_s,
            max_owner_rows=settings.max_key_rows if settings.api_keys else None,
            prompt_cache_bytes=(settings.prompt_cache_mb << 20) // settings.replicas,
        )

    def fail(self, reason: str) -> None:
        """Serve nothing until the next start; /readyz and /livez tell the reason."""
        self.state, self.reason = "failed", reason
        logger.error("not serving: %s", reason)


def _what(films: bool | None) -> str:
    return "videos" if films else "pictures"


def find_bundles(root: Path) -> list[Path]:
    """``root`` itself if it is a bundle, else the bundles in it, by name. Raises BundleError when there is none.

    A folder that looks like a model but has lost its manifest counts, so that opening it tells.
    """
    if (root / MANIFEST).is_file():
        return [root]
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder; set LEAPFROG_BUNDLES to a bundle or a folder of bundles")
    found = sorted(
        {path.parent for name in (MANIFEST, "model_index.json", "*.onnx") for path in root.glob(f"*/{name}")}
    )
    if not found:
        raise BundleError(f"{root} has no bundle; set LEAPFROG_BUNDLES to a bundle or a folder of bundles")
    return found
