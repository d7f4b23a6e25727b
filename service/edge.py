"""The outermost layer of the server: everything that must hold for every path, BentoML's own included.

Request ids, API keys, a cap on bodies (declared or chunked), bounded metric labels, and errors in OpenAI's envelope.
It runs before BentoML's metrics and routing, so a refused request takes no place anywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from service.errors import ApiError
from service.logs import REQUEST
from service.settings import Settings

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/healthz", "/metrics"})
KNOWN_PATHS = OPEN_PATHS | {
    "/v1/images/generations",
    "/v1/estimate",
    "/v1/queue",
    "/v1/models",
    "/v1/loras",
    "/v1/images/edits",
    "/v1/realtime",
    "/v1/videos",
    "/v1/videos/sync",
    "/v1/openapi.json",
    "/generate",
    "/schema.json",
    "/docs.json",
}
TEMPLATES = (
    (re.compile(r"^/v1/models/[^/]+$"), "/v1/models/{id}"),
    (re.compile(r"^/v1/videos/[^/]+$"), "/v1/videos/{id}"),
    (re.compile(r"^/v1/videos/[^/]+/cancel$"), "/v1/videos/{id}/cancel"),
    (re.compile(r"^/v1/videos/[^/]+/content$"), "/v1/videos/{id}/content"),
    (re.compile(r"^/v1/videos/[^/]+/events$"), "/v1/videos/{id}/events"),
    (re.compile(r"^/v1/requests/[^/]+/cancel$"), "/v1/requests/{id}/cancel"),
    (re.compile(r"^/v1/admin/loras/[^/]+$"), "/v1/admin/loras/{id}"),
)
ADMIN = "/v1/admin/"
UPLOAD_S = 300.0
"""For an admin to send a file."""
UNREAD = frozenset({"/v1/images/edits"})
UNREAD_BYTES = 25 << 20
"""Of a body that is not looked at, so that its sender hears why and not how large it is."""
UNKNOWN_PATH = "/{unknown}"
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
DRAIN_FACTOR = 64
"""A refused body is read on up to this many times the limit, so that its sender gets to see the 413."""

STATE = "leapfrog"
"""Key of the scope under which a RequestState travels to the inner applications."""


class RequestState:
    """What the edge knows of a request, and an error that an inner layer wants to be told to the caller."""

    def __init__(self, request_id: str, path: str) -> None:
        self.request_id, self.path = request_id, path
        self.owner = ""
        """Of whose pictures this is about: a name of the API key that does not tell it, or nobody's."""
        self.admin = False
        self.error: ApiError | None = None
        self.receive: Receive | None = None
        """The body and then whether the client has left, past every layer between the edge and the routes."""


class Edge:
    """ASGI application around BentoML's."""

    def __init__(self, app: ASGIApp, settings: Settings, measure: Callable[[], None] = lambda: None) -> None:
        """measure: called before /metrics is answered, for what is only known by looking."""
        self.app, self.settings, self.measure = app, settings, measure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = RequestState(given if REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}", scope["path"])
        REQUEST.set(state.request_id)
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send, state, headers)
            return
        reply = Reply(send, state, scope["method"])
        try:
            self._keep_private(scope)
            self._authenticate(state, key_of(headers))
            body = await self._body(state, headers, receive)
            inner = {**scope, "path": metric_path(scope["path"]), STATE: state}
            state.receive = replay(body, receive)
            if state.path == "/metrics":
                self.measure()
            await self.app(inner, state.receive, reply)
        except ApiError as error:
            await reply.error(error)
        except Exception:
            logger.exception("request %s: %s %s failed", state.request_id, scope["method"], scope["path"])
            await reply.error(errors.internal(state.request_id))

    async def _socket(self, scope: Scope, receive: Receive, send: Send, state: RequestState, headers: Headers) -> None:
        """A WebSocket: for those who have the key, and in browsers only for pages of this very server."""
        try:
            self._keep_private(scope)
            self._authenticate(state, key_of(headers) or key_of_protocols(scope.get("subprotocols", ())))
            if not is_same_host(headers):
                raise ApiError(403, "the page is of another host", code="forbidden")
        except ApiError as error:
            # Before it is accepted, closing is an HTTP 403.
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})
            return
        path = state.path if state.path in KNOWN_PATHS else UNKNOWN_PATH
        await self.app({**scope, "path": path, STATE: state}, receive, send)

    def _keep_private(self, scope: Scope) -> None:
        """Without API keys only this machine is answered, whatever address the server was told to listen on."""
        if self.settings.api_keys or self.settings.public or is_loopback(scope.get("server")):
            return
        message = (
            "this server has no API keys and answers only its own machine; "
            "set LEAPFROG_API_KEYS, or LEAPFROG_PUBLIC=1 to answer everybody"
        )
        logger.warning("refused a request on %s: %s", scope["server"][0], message)
        raise ApiError(403, message, code="forbidden")

    def _authenticate(self, state: RequestState, given: bytes) -> None:
        """Set the owner. Raises ApiError 401 where a key is needed and 403 where it must be an admin's."""
        settings, for_admins = self.settings, state.path.startswith(ADMIN)
        if for_admins and not settings.admin_keys:
            raise errors.needs_admin("this server has no admin keys; set LEAPFROG_ADMIN_KEYS")
        if state.path in OPEN_PATHS or not (settings.api_keys or for_admins):
            return
        users, admins = matches(given, settings.api_keys), matches(given, settings.admin_keys)
        if not (users or admins):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if for_admins and not admins:
            raise errors.needs_admin()
        state.owner, state.admin = hashlib.sha256(given).hexdigest()[:12], admins

    async def _body(self, state: RequestState, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError 413 when it is too large and 408 when it does not arrive in time."""
        limit, seconds, read, chunks = self.settings.max_body_bytes, self.settings.body_timeout_s, 0, list[bytes]()
        if state.admin and state.path.startswith(ADMIN):
            limit, seconds = self.settings.max_lora_mb << 20, max(seconds, UPLOAD_S)
        unread = state.path in UNREAD
        if unread:
            limit = max(limit, UNREAD_BYTES)
        deadline = time.monotonic() + seconds
        more = True
        while more and read <= limit * DRAIN_FACTOR:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                if read > limit:
                    break
                message_text = f"the body did not arrive within {seconds:g} s; send it again"
                raise ApiError(408, message_text, code="request_timeout", headers={"connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise ApiError(408, "the client closed the connection", code="client_disconnected")
            read += len(message.get("body", b""))
            if read <= limit and not unread:
                chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        if read > limit:
            seen = headers.get("content-length", f"more than {limit}")
            text = f"the body has {seen} bytes; send at most {limit}"
            raise ApiError(413, text, code="request_too_large", headers={"connection": "close"})
        return b"".join(chunks)


class Reply:
    """Wraps ``send``: adds the request id, and puts every error that is not in the envelope yet into it."""

    def __init__(self, send: Send, state: RequestState, method: str) -> None:
        self._send, self._state, self._method = send, state, method
        self._held: Message | None = None
        self._body = b""
        self._started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["x-request-id"] = self._state.request_id
            if message["status"] >= 400:
                self._held = message
                return
            self._started = True
        elif message["type"] == "http.response.body" and self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish_error(self._held)
            return
        await self._send(message)

    async def error(self, error: ApiError) -> None:
        """Answer with an error unless an answer has begun."""
        if self._started:
            return
        self._started = True
        response = error.response()
        response.headers["x-request-id"] = self._state.request_id
        # HEAD has no body, but the headers of the answer stay those of a GET.
        await self._send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": b"" if self._method == "HEAD" else response.body})

    async def _finish_error(self, start: Message) -> None:
        if _in_envelope(self._body):
            self._started = True
            await self._send(start)
            await self._send({"type": "http.response.body", "body": self._body})
            return
        headers = Headers(raw=start["headers"])
        error = self._state.error or translate(start["status"], self._body, self._state, self._method)
        error.headers |= {name: headers[name] for name in ("allow", "content-range") if name in headers}
        await self.error(error)


class RestorePath:
    """Innermost middleware: routing sees the real path again, which metrics saw as a template.

    It also receives straight from the edge: whoever waits for a picture looks every 50 ms whether his client is still
    there, and BentoML's layers would open a span of OpenTelemetry for each look, 0.3 ms of the processor.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if STATE in scope:
            state: RequestState = scope[STATE]
            scope, receive = {**scope, "path": state.path}, state.receive or receive
        await self.app(scope, receive, send)


def key_of(headers: Headers) -> bytes:
    """The API key of a request; empty if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def matches(given: bytes, keys: Sequence[str]) -> bool:
    """Whether a key is one of ``keys``; all are compared, so that the time tells neither which one nor how far."""
    found = [secrets.compare_digest(given, known.encode()) for known in keys]
    return any(found)


PROTOCOL = "realtime"
KEY_PROTOCOL = "openai-insecure-api-key."


def key_of_protocols(protocols: Sequence[str]) -> bytes:
    """The API key among the protocols of a WebSocket, which are all that a browser lets a page send."""
    found = (name.removeprefix(KEY_PROTOCOL) for name in protocols if name.startswith(KEY_PROTOCOL))
    return next(found, "").encode()


def is_same_host(headers: Headers) -> bool:
    """Whether a request comes from no page, or from one of this server."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host", "")


def is_loopback(server: tuple[str, int | None] | None) -> bool:
    """Whether a connection came in on an address that only this machine reaches; a socket in the file system is one."""
    if server is None or server[1] is None:
        return True
    try:
        return ipaddress.ip_address(server[0]).is_loopback
    except ValueError:
        return server[0] == "localhost"


def metric_path(path: str) -> str:
    """A path for metric labels: itself if known, else its template, so that scanners cannot add series."""
    if path in KNOWN_PATHS:
        return path
    return next((template for pattern, template in TEMPLATES if pattern.match(path)), UNKNOWN_PATH)


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives ``body`` once and then waits for the client to leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def inner() -> Message:
        return messages.pop() if messages else await receive()

    return inner


def translate(status: int, body: bytes, state: RequestState, method: str) -> ApiError:
    """An error of BentoML or Starlette (plain text, or JSON of another shape) as ours."""
    if status == 404:
        return ApiError(404, f"there is no {method} {state.path[:120]}; see GET /v1/models", code="not_found")
    if status == 405:
        return ApiError(405, f"{state.path[:120]} does not take {method}", code="method_not_allowed")
    if status == 416:
        text = "the range lies beyond the end of the file; content-range has its length"
        return ApiError(416, text, code="range_not_satisfiable", param="Range")
    if status == 500:
        return errors.internal(state.request_id)
    param, message = _first_detail(body)
    if status == 503:
        return errors.unavailable(message, "not_ready")
    return ApiError(status, message, code="invalid_value" if status < 500 else "server_error", param=param)


def _first_detail(body: bytes) -> tuple[str | None, str]:
    """(field, message) of BentoML's validation errors, its one-element lists of errors, or plain text."""
    data = _json(body)
    if isinstance(data, Sequence) and data and isinstance(data[0], dict):
        data = data[0]
    if not isinstance(data, dict):
        return None, body.decode("utf-8", "replace").strip()[:500] or "the request failed"
    detail = data.get("detail")
    if isinstance(detail, list) and detail:
        param = ".".join(str(part) for part in detail[0].get("loc", ())) or None
        return param, f"{param or 'the body'}: {detail[0].get('msg', 'is wrong')}"
    return None, str(data.get("error") or detail or "the request failed")[:500]


def _in_envelope(body: bytes) -> bool:
    data = _json(body)
    return isinstance(data, dict) and isinstance(data.get("error"), dict) and "message" in data["error"]


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
