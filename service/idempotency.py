"""Idempotency-Key: a request that is sent again joins the first one while it runs and gets its answer afterwards.

Keys belong to an owner (an API key). The same key with another body is a mistake and told so. Answers are kept for a
while and within bytes; failures are not kept, so that a retry computes. The work goes on as long as anybody waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from service.cache import ByteCache
from service.errors import ApiError, Disconnected, invalid

TTL_S = 600.0
LARGEST_KEY = 255
WATCH_S = 0.05
Gone = Callable[[], Awaitable[bool]]
"""Whether nobody waits for an answer any more."""


@dataclass(eq=False)
class _Running:
    body: bytes
    task: asyncio.Task[Response]
    waiters: int = 0


@dataclass(frozen=True)
class _Kept:
    body: bytes
    response: Response
    until: float


class Replies:
    """Answers by (owner, key). Lives on the event loop."""

    def __init__(self, max_bytes: int = 32 << 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[tuple[str, str], _Running] = {}
        self._kept: ByteCache[_Kept] = ByteCache(max_bytes)

    async def once(
        self, owner: str, key: str, body: bytes, work: Callable[[Gone], Awaitable[Response]], gone: Gone
    ) -> Response:
        """The answer of ``work``, which runs once per key. Raises what it raises, ApiError 409, and Disconnected."""
        if not (0 < len(key) <= LARGEST_KEY and key.isascii() and key.isprintable()):
            raise invalid(
                "Idempotency-Key", f"Idempotency-Key has {len(key)} characters; give 1 to {LARGEST_KEY} ASCII ones"
            )
        name, digest = (owner, key), hashlib.sha256(body).digest()
        kept = self._kept.get(name)
        if kept is not None and self._clock() < kept.until:
            _check(kept.body, digest)
            return _replay(kept.response)
        first = name not in self._running
        if first:
            self._begin(name, digest, work)
        running = self._running[name]
        _check(running.body, digest)
        running.waiters += 1
        try:
            while not (await asyncio.wait({running.task}, timeout=WATCH_S))[0]:
                if await gone():
                    raise Disconnected
            return running.task.result() if first else _replay(running.task.result())
        finally:
            running.waiters -= 1

    def _begin(self, name: tuple[str, str], digest: bytes, work: Callable[[Gone], Awaitable[Response]]) -> None:
        async def abandoned() -> bool:
            return self._running[name].waiters == 0

        def end(task: asyncio.Task[Response]) -> None:
            del self._running[name]
            if not task.cancelled() and task.exception() is None:
                response = task.result()
                self._kept.put(name, _Kept(digest, response, self._clock() + TTL_S), len(response.body) + 1000)

        async def run() -> Response:
            return await work(abandoned)

        task = asyncio.get_running_loop().create_task(run())
        self._running[name] = _Running(digest, task)
        task.add_done_callback(end)


def _check(first: bytes, now: bytes) -> None:
    if first != now:
        raise ApiError(
            409,
            "this Idempotency-Key was used with another body; use a new key for a new request",
            code="idempotency_conflict",
            param="Idempotency-Key",
            headers={"x-should-retry": "false"},
        )


def _replay(response: Response) -> Response:
    kept = {k: v for k, v in response.headers.items() if k != "content-length"}
    return Response(response.body, response.status_code, headers={**kept, "idempotent-replayed": "true"})
