"""Idempotency keys: the work runs once, whoever asks and leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, Disconnected
from service.idempotency import TTL_S, Gone, Replies


class Work:
    """Counts its runs and ends when told to; gives up when nobody waits."""

    def __init__(self) -> None:
        self.runs = 0
        self.given_up = 0
        self.go = asyncio.Event()

    async def __call__(self, gone: Gone) -> Response:
        self.runs += 1
        while not self.go.is_set():
            if await gone():
                self.given_up += 1
                raise Disconnected
            await asyncio.sleep(0.001)
        return JSONResponse({"run": self.runs})


async def here() -> bool:
    return False


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def test_a_second_request_joins_the_first_and_later_ones_get_its_answer() -> None:
    async def scenario() -> None:
        replies, work = Replies(), Work()
        two = [asyncio.create_task(replies.once("a", "k", b"body", work, here)) for _ in range(2)]
        await asyncio.sleep(0.01)
        work.go.set()
        first, second = [await task for task in two]
        third = await replies.once("a", "k", b"body", work, here)
        assert work.runs == 1
        assert first.body == second.body == third.body == b'{"run":1}'
        assert "idempotent-replayed" not in first.headers
        assert second.headers["idempotent-replayed"] == third.headers["idempotent-replayed"] == "true"
        assert third.headers["content-type"] == "application/json"
        assert third.headers.getlist("content-length") == ["9"]

    play(scenario)


def test_another_body_is_a_conflict_that_clients_do_not_retry_and_another_owner_is_another_key() -> None:
    async def scenario() -> None:
        replies, work = Replies(), Work()
        work.go.set()
        await replies.once("a", "k", b"body", work, here)
        with pytest.raises(ApiError) as refused:
            await replies.once("a", "k", b"other", work, here)
        assert (refused.value.status, refused.value.code) == (409, "idempotency_conflict")
        assert refused.value.headers["x-should-retry"] == "false"
        assert (await replies.once("b", "k", b"other", work, here)).body == b'{"run":2}'

    play(scenario)


def test_the_work_goes_on_while_anybody_waits_and_stops_when_nobody_does() -> None:
    async def scenario() -> None:
        replies, work, left = Replies(), Work(), asyncio.Event()

        async def gone() -> bool:
            return left.is_set()

        leaving = asyncio.create_task(replies.once("a", "k", b"", work, gone))
        staying = asyncio.create_task(replies.once("a", "k", b"", work, here))
        await asyncio.sleep(0.01)
        left.set()
        with pytest.raises(Disconnected):
            await leaving
        work.go.set()
        assert (await staying).body == b'{"run":1}'
        work.go.clear()
        with pytest.raises(Disconnected):
            await replies.once("a", "other", b"", work, gone)
        while not work.given_up:
            await asyncio.sleep(0.001)

    play(scenario)


def test_failures_are_not_kept_and_answers_expire() -> None:
    async def scenario() -> None:
        now = [0.0]
        replies, work = Replies(clock=lambda: now[0]), Work()
        work.go.set()

        async def fails(gone: Gone) -> Response:
            raise ApiError(500, "it failed", code="internal_error")

        with pytest.raises(ApiError, match="it failed"):
            await replies.once("a", "k", b"", fails, here)
        await replies.once("a", "k", b"", work, here)
        now[0] = TTL_S - 1
        await replies.once("a", "k", b"", work, here)
        assert work.runs == 1
        now[0] = TTL_S + 1
        await replies.once("a", "k", b"", work, here)
        assert work.runs == 2

    play(scenario)


@pytest.mark.parametrize("key", ["", "x" * 256, "ключ", "a\tb"])
def test_unusable_keys_are_refused(key: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError) as refused:
            await Replies().once("a", key, b"", Work(), here)
        assert (refused.value.status, refused.value.param) == (400, "Idempotency-Key")

    play(scenario)
