"""The BentoML service. BentoML supervises, packages, and hosts health and metrics; the rest is ours.

bentoml serve                                     # in the repository: http://127.0.0.1:3000
curl -s localhost:3000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "a red cube"}'

import bentoml
bentoml.SyncHTTPClient("http://127.0.0.1:3000").generate(prompt="a red cube", seed=7, steps=4).save("cube.png")
"""

from __future__ import annotations

import os

# BentoML reads it when it starts to serve: nothing leaves this machine unless its owner says so.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import asyncio
import io
import logging
import threading
from http import HTTPStatus
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from PIL import Image
from PIL.Image import Image as Picture
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from service import logs, routes, schemas, tracing
from service.edge import STATE, Edge, RequestState, RestorePath
from service.encode import EncodePool
from service.errors import ApiError
from service.images import Hub, counted, draw
from service.registry import Registry
from service.settings import Settings, SettingsError


def make_hub() -> Hub:
    """Settings, registry and pool. Unusable settings do not crash the worker, which would only be restarted forever."""
    try:
        settings, broken = Settings.from_env(), None
    except SettingsError as error:
        settings, broken = Settings(), str(error)
    return Hub(settings, Registry(settings, broken), EncodePool(settings.encode_threads))


class EdgeService(bentoml.Service[Any]):  # type: ignore[misc]
    """BentoML's service with our outermost layer around it."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        self.inject_config()
        try:
            hub.tracer = tracing.open_tracer()
        except SettingsError as error:
            hub.registry.fail(str(error))
        return Edge(super().to_asgi(is_main=is_main), hub.settings, hub.registry.measure_memory)


class NoCallerErrors(logging.Filter):
    """BentoML logs a traceback for every bad request; those are the callers' errors and are told to them."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (ValidationError, CallerError))


class CallerError(BentoMLException):
    """Carries the status of an ApiError through BentoML; the edge puts the rest back."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message, error_code=HTTPStatus(error.status))


PROBES = "/(livez|readyz|healthz|metrics)$"
"""Which machines ask for every few seconds, so that no traces are made of them."""
hub = make_hub()
web = routes.build(hub)


@bentoml.service(
    service_class=EdgeService,
    name="leapfrog",
    workers=1,
    traffic={"timeout": 3600},
    http={"host": "127.0.0.1", "port": 3000},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": [PROBES]},
)
@bentoml.asgi_app(web, path="/")
class Leapfrog:
    """Few-step students behind OpenAI's images API."""

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Load in a thread: the port answers /livez and /readyz from the first moment."""
        logs.configure(hub.settings.log)
        logging.getLogger("bentoml._internal.server.http_app").addFilter(NoCallerErrors())
        threading.Thread(target=self._load, name="load", daemon=True).start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        hub.studio.close()
        await asyncio.to_thread(hub.registry.close)
        await asyncio.to_thread(hub.studio.end)
        hub.pool.close()
        if hub.tracer is not None:
            await asyncio.to_thread(tracing.flush)

    async def __is_ready__(self) -> bool:
        if not hub.registry.ready:
            raise HTTPException(503, f"not ready: {hub.registry.reason or 'an engine has died, see the log'}")
        return True

    async def __is_alive__(self) -> bool:
        if not hub.registry.alive:
            raise HTTPException(503, f"not alive: {hub.registry.reason or 'an engine has died, see the log'}")
        return True

    @bentoml.api  # type: ignore[untyped-decorator]
    async def generate(
        self, ctx: bentoml.Context, prompt: str, seed: int | None = None, steps: int | None = None
    ) -> Picture:
        """One picture of ``prompt``; the same seed and steps give the same picture again."""
        state: RequestState = ctx.request.scope[STATE]
        fields = {"prompt": prompt, "seed": seed, "steps": steps}
        asked = {name: value for name, value in fields.items() if value is not None}
        try:
            with counted(hub):
                return await self._picture(ctx, asked)
        except ApiError as error:
            state.error = error
            raise CallerError(error) from None

    def _load(self) -> None:
        hub.pool.warm_up()
        hub.registry.load(hub.open)

    async def _picture(self, ctx: bentoml.Context, asked: dict[str, Any]) -> Picture:
        request = schemas.validate(asked, schemas.ImageRequest)
        model = hub.registry.get(None)
        plan = schemas.plan(request, model.bundle.manifest, hub.settings)
        ctx.response.metadata["x-seed"] = str(plan.seeds[0])
        return Image.open(io.BytesIO((await draw(hub, model, plan, ctx.request))[0].data))


Leapfrog.add_asgi_middleware(RestorePath)  # type: ignore[attr-defined]
