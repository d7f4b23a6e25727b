"""WS /v1/realtime: a prompt that changes while it is typed, and a picture of its newest version, again and again.

A client sends a text message per change, with the fields of POST /v1/images/generations that decide a picture:

    {"type": "prompt", "prompt": "a red cube", "seed": 7, "steps": 1, "output_format": "jpeg", "id": "any text"}

One picture is drawn at a time. Of the prompts that come meanwhile the newest is next and all others are dropped, so
that what is shown is never older than one picture. Each picture is two messages, ``{"type": "frame", "id", "seed",
"dropped", "bytes", "metrics", …}`` and a binary one with the file; a wrong prompt is ``{"type": "error", "id", "error":
{…}}`` and the session goes on. The models draw from text alone, so ``image`` is refused.

The API key comes in the Authorization header or, for browsers, as the protocol ``openai-insecure-api-key.KEY`` beside
``realtime``. A page of another host is refused, as browsers let any page open any WebSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from service import errors, metrics, schemas
from service.answers import timings
from service.edge import PROTOCOL, STATE, RequestState
from service.errors import ApiError, Disconnected, invalid, unsupported
from service.images import Drawing, Hub, counted
from service.registry import Model
from service.schemas import ImageRequest

logger = logging.getLogger(__name__)

LARGEST_MESSAGE = 16 << 10
"""Characters."""
FIELDS = (frozenset(ImageRequest.model_fields) | {"num_inference_steps"}) - {
    *("n", "response_format", "background", "stream", "partial_images", "progress"),
    *("user", "safety_identifier", "moderation", "style"),
}
TRY_AGAIN, TOO_BIG = 1013, 1009


@dataclass
class Session:
    """One connection: the newest prompt that waits, and how many were overtaken."""

    hub: Hub
    socket: WebSocket
    state: RequestState
    newest: dict[str, Any] | None = None
    dropped: int = 0
    frames: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    speaking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Until the client leaves, is silent for too long, or the server stops."""
        await self._say("session.created", **self._described())
        reading = asyncio.create_task(self._read())
        drawing = asyncio.create_task(self._draw())
        try:
            await asyncio.wait({reading, drawing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.over = True
            for task in (reading, drawing):
                task.cancel()
            for result in await asyncio.gather(reading, drawing, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect | RuntimeError):
                    logger.error("session %s failed", self.state.request_id, exc_info=result)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self.socket.close(1000, "the session is over")

    async def _read(self) -> None:
        """Take messages as they come; only the newest prompt stays."""
        while True:
            try:
                message = await asyncio.wait_for(self.socket.receive(), self.hub.settings.session_idle_s)
            except TimeoutError:
                return
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None or len(text) > LARGEST_MESSAGE:
                await self.socket.close(TOO_BIG, f"send texts of at most {LARGEST_MESSAGE} characters")
                return
            try:
                told = schemas.load(text.encode("utf-8", "surrogatepass"))
                if told.get("type") == "stop":
                    return
                if told.get("type") != "prompt":
                    seen = schemas.shown(told.get("type"))
                    raise invalid("type", f"type is {seen}; send prompt or stop")
            except ApiError as error:
                await self._refuse(None, error)
                continue
            self.dropped += self.newest is not None
            self.newest = told
            self.changed.set()

    async def _draw(self) -> None:
        """Draw the newest prompt, one picture at a time."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            told, self.newest = self.newest, None
            if told is None:
                continue
            name = told.get("id")
            try:
                with counted(self.hub):
                    await self._frame(name, told)
            except ApiError as error:
                await self._refuse(name, error)

    async def _frame(self, name: Any, told: dict[str, Any]) -> None:
        model, asked = self._asked(name, told)
        plan = schemas.plan(asked, model.bundle.manifest, self.hub.settings)
        with Drawing(self.hub, model, plan, self.state) as drawing:
            [file] = await drawing.files(self._gone)
        width, height = plan.size
        dropped, self.dropped, self.frames = self.dropped, 0, self.frames + 1
        await self._say(
            "frame",
            file.data,
            id=name,
            model=model.name,
            seed=file.seed,
            size=f"{width}x{height}",
            output_format=plan.output_format,
            dropped=dropped,
            bytes=len(file.data),
            metrics=timings(plan, [file], drawing.begun),
        )

    def _asked(self, name: Any, told: dict[str, Any]) -> tuple[Model, ImageRequest]:
        """The model and the request of a message. Raises ApiError."""
        if not (name is None or (isinstance(name, str) and len(name) <= 64)):
            raise invalid("id", f"id is {schemas.shown(name)}; give a text of up to 64 characters, or leave it out")
        if "image" in told:
            raise unsupported("image", "image was sent; the models draw from text alone, leave it out")
        for key in told.keys() - FIELDS - {"type", "id"}:
            text = f"{schemas.shown(key)} is not a field of a realtime prompt; use {', '.join(sorted(FIELDS))}"
            raise invalid(key[: schemas.SHOWN_CHARS], text, "unknown_parameter")
        fields = {key: value for key, value in told.items() if key in FIELDS and value is not None}
        asked = schemas.validate(schemas.without_aliases({"output_format": "jpeg", **fields}), ImageRequest)
        return self.hub.registry.get(asked.model, films=False), asked

    async def _gone(self) -> bool:
        return self.over

    async def _refuse(self, name: Any, error: ApiError) -> None:
        wait = error.headers.get("retry-after-ms")
        await self._say("error", id=name, retry_after_ms=None if wait is None else int(wait), **error.body())

    async def _say(self, kind: str, data: bytes | None = None, **told: Any) -> None:
        """One message, and right behind it the bytes that it announces."""
        async with self.speaking:
            await self.socket.send_text(json.dumps({"type": kind, **told}))
            if data is not None:
                await self.socket.send_bytes(data)

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.state.request_id,
            "models": [model.name for model in self.hub.registry.all() if not model.films],
            "image_to_image": False,
            "idle_s": self.hub.settings.session_idle_s,
        }


def add_routes(web: FastAPI, hub: Hub) -> None:
    sessions: list[Session] = []

    @web.get("/v1/realtime")
    async def only_upgraded() -> None:
        text = "this is a WebSocket; connect to it as one, with ws:// in the place of http://"
        raise ApiError(426, text, code="upgrade_required", headers={"upgrade": "websocket"})

    @web.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        state: RequestState = socket.scope[STATE]
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
        refused = _refusal(hub, sessions)
        if refused is not None:
            await socket.send_text(json.dumps({"type": "error", "id": None, **refused.body()}))
            await socket.close(TRY_AGAIN, refused.code)
            return
        session = Session(hub, socket, state)
        sessions.append(session)
        metrics.SESSIONS.set(len(sessions))
        try:
            await session.run()
        except (Disconnected, WebSocketDisconnect, RuntimeError):
            pass  # the client left while something was said to it
        finally:
            sessions.remove(session)
            metrics.SESSIONS.set(len(sessions))
            logger.info("session %s: %d pictures", state.request_id, session.frames)


def _refusal(hub: Hub, sessions: list[Session]) -> ApiError | None:
    """Why no session can begin now."""
    try:
        hub.registry.get(None, films=False)
    except ApiError as error:
        return error
    if len(sessions) >= hub.settings.max_sessions:
        return errors.unavailable(
            f"{len(sessions)} sessions are open, which is the most; try again later", "queue_full"
        )
    return None
