"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, built in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An error that a caller sees. The message says what is wrong, the value seen and the way out."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message = _printable(message)
        self.param = None if param is None else _printable(param)
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 or self.status == 408 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


class Disconnected(Exception):
    """The client has gone; its pictures were given up."""


def _printable(text: str) -> str:
    """Text that can be sent: JSON may smuggle in half a surrogate pair, which UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: the request is wrong and stays wrong."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """400: a part of OpenAI's interface that this server does not have."""
    return invalid(param, message, "unsupported_operation")


def needs_admin(message: str = "this needs an admin key; send one of LEAPFROG_ADMIN_KEYS") -> ApiError:
    """403: the key opens other paths, or there are no admins."""
    return ApiError(403, message, code="forbidden")


def queue_full(waiting: int, retry_after_s: float) -> ApiError:
    """429 with the time after which a place should be free."""
    headers = {
        "retry-after": str(max(1, math.ceil(retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1e3))),
        "x-queue-depth": str(waiting),
    }
    message = f"the queue is full ({waiting} pictures wait); retry in about {max(retry_after_s, 0.1):.1f} s"
    return ApiError(429, message, code="queue_full", headers=headers)


def key_limit(held: int, retry_after_s: float) -> ApiError:
    """429 that concerns this API key alone."""
    error = queue_full(held, retry_after_s)
    message = f"this API key has {held} pictures on their way; retry in about {max(retry_after_s, 0.1):.1f} s"
    return ApiError(429, message, code="key_limit", headers=error.headers)


def too_many_videos(unfinished: int, retry_after_s: float, *, of_key: bool) -> ApiError:
    """429: as many video jobs as there may be, of everybody or of one key."""
    error = queue_full(unfinished, retry_after_s)
    whose, code = ("this API key has", "key_limit") if of_key else ("the server has", "queue_full")
    message = f"{whose} {unfinished} unfinished videos; retry in about {max(retry_after_s, 0.1):.1f} s"
    return ApiError(429, message, code=code, headers=error.headers)


def deadline_exceeded(deadline_s: float, needed_s: float) -> ApiError:
    """504: told at once where it can be foreseen. Clients retry it, when there may be less to do."""
    message = (
        f"deadline_ms is {deadline_s * 1e3:.0f} and the pictures need about {needed_s * 1e3:.0f} ms now; "
        "give more time, fewer steps or fewer pictures"
    )
    headers = {"retry-after-ms": str(max(1, math.ceil((needed_s - deadline_s) * 1e3)))}
    return ApiError(504, message, code="deadline_exceeded", param="deadline_ms", headers=headers)


def cancelled() -> ApiError:
    """The answer to a request that somebody cancelled; nobody should send it again by himself."""
    return ApiError(409, "the request was cancelled", code="cancelled", headers={"x-should-retry": "false"})


def out_of_memory() -> ApiError:
    message = "memory ran out, also with a smaller batch; ask for a smaller size or try again later"
    return ApiError(500, message, code="out_of_memory", headers={"x-should-retry": "false"})


def unavailable(message: str, code: str, retry_after_s: int = 1) -> ApiError:
    """503: not now (loading, failed or shutting down)."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})


def internal(request_id: str) -> ApiError:
    """500 that tells nothing but where to look; a repeated request would fail again, so clients shall not retry."""
    message = f"internal error; the server's log has the details under request id {request_id}"
    return ApiError(500, message, code="internal_error", headers={"x-should-retry": "false"})
