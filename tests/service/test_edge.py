"""The outermost layer by itself: who is answered on which address, owners, labels of metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from service.edge import STATE, Edge, RestorePath, is_loopback, is_same_host, key_of_protocols, metric_path
from service.settings import Settings


class Inner:
    """Remembers the scope that came through."""

    scope: Scope | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        await PlainTextResponse("through")(scope, receive, send)


def ask(
    settings: Settings,
    server: tuple[str, int | None] | None,
    path: str = "/v1/models",
    measure: Callable[[], None] = lambda: None,
    **headers: str,
) -> tuple[int, dict[str, Any], Inner]:
    inner, sent = Inner(), list[Message]()
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "server": server,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Edge(inner, settings, measure)(scope, receive, send))
    body = sent[1]["body"]
    return sent[0]["status"], json.loads(body) if body.startswith(b"{") else {}, inner


LOCAL = [("127.0.0.1", 3000), ("::1", 3000), ("localhost", 3000), ("/run/leapfrog.sock", None), None]
PUBLIC = [("10.1.2.3", 3000), ("0.0.0.0", 3000), ("2001:db8::1", 3000), ("example.org", 443)]


@pytest.mark.parametrize("server", LOCAL)
def test_without_keys_this_machine_is_answered(server: tuple[str, int | None] | None) -> None:
    assert is_loopback(server)
    assert ask(Settings(), server)[0] == 200


@pytest.mark.parametrize("server", PUBLIC)
def test_without_keys_nobody_else_is_unless_told_to(server: tuple[str, int]) -> None:
    assert not is_loopback(server)
    status, body, inner = ask(Settings(), server)
    assert (status, body["error"]["code"]) == (403, "forbidden")
    assert "LEAPFROG_API_KEYS" in body["error"]["message"]
    assert inner.scope is None
    assert ask(Settings(public=True), server)[0] == 200


@pytest.mark.parametrize("server", PUBLIC)
def test_with_keys_the_key_decides(server: tuple[str, int]) -> None:
    settings = Settings(api_keys=("alpha", "beta"))
    assert ask(settings, server)[0] == 401
    assert ask(settings, server, authorization="Bearer beta")[0] == 200


def test_owners_differ_by_key_and_do_not_tell_it() -> None:
    settings = Settings(api_keys=("alpha", "beta"))
    owners = set()
    for key in settings.api_keys:
        _, _, inner = ask(settings, LOCAL[0], authorization=f"Bearer {key}")
        assert inner.scope is not None
        owners.add(inner.scope[STATE].owner)
    assert len(owners) == 2
    assert not any(key in owner for owner in owners for key in settings.api_keys)
    _, _, anonymous = ask(Settings(), LOCAL[0])
    assert anonymous.scope is not None
    assert anonymous.scope[STATE].owner == ""


def test_admin_paths_are_for_admin_keys_alone() -> None:
    path = "/v1/admin/loras/a"
    assert ask(Settings(), LOCAL[0], path)[0] == 403
    assert ask(Settings(api_keys=("alpha",)), LOCAL[0], path, authorization="Bearer alpha")[0] == 403
    for keys in ((), ("alpha",)):
        settings = Settings(api_keys=keys, admin_keys=("root",))
        assert ask(settings, LOCAL[0], path)[0] == 401
        assert ask(settings, LOCAL[0], path, authorization="Bearer alpha")[0] == (403 if keys else 401)
        status, _, inner = ask(settings, LOCAL[0], path, authorization="Bearer root")
        assert status == 200 and inner.scope is not None and inner.scope[STATE].admin
    _, _, inner = ask(settings, LOCAL[0], authorization="Bearer alpha")
    assert inner.scope is not None and not inner.scope[STATE].admin


@pytest.mark.parametrize(
    ("origin", "same"),
    [(None, True), ("http://here:3000", True), ("https://here:3000", True), ("http://there", False), ("null", False)],
)
def test_sockets_are_for_pages_of_this_host(origin: str | None, same: bool) -> None:
    headers = {"host": "here:3000"} | ({} if origin is None else {"origin": origin})
    assert is_same_host(Headers(headers)) == same


def test_a_key_may_come_among_the_protocols() -> None:
    assert key_of_protocols(["realtime", "openai-insecure-api-key.alpha"]) == b"alpha"
    assert key_of_protocols(["realtime"]) == b""


def test_labels_of_metrics_are_templates() -> None:
    assert metric_path("/v1/queue") == "/v1/queue"
    assert metric_path("/v1/requests/abc/cancel") == "/v1/requests/{id}/cancel"
    assert metric_path("/v1/requests/abc") == "/{unknown}"


def test_what_is_only_known_by_looking_is_looked_at_for_metrics_alone() -> None:
    looked: list[str] = []
    for path in ("/livez", "/v1/models", "/metrics", "/metrics/x"):
        ask(Settings(), LOCAL[0], path, partial(looked.append, path))
    assert looked == ["/metrics"]


def test_routes_hear_from_their_client_past_all_layers_between() -> None:
    """They ask often whether he is still there; whatever a layer does when it is asked would be done each time."""
    heard, asked = list[bytes | bool](), 0

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        heard.extend([await request.body(), await request.is_disconnected(), await request.is_disconnected()])
        await PlainTextResponse("through")(scope, receive, send)

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        async def watched() -> Message:
            nonlocal asked
            asked += 1
            return await receive()

        await RestorePath(route)(scope, watched, send)

    messages: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"b", "more_body": False},
        {"type": "http.request", "body": b"a", "more_body": True},
    ]

    async def receive() -> Message:
        return messages.pop()

    async def send(message: Message) -> None:
        pass

    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/models", "server": LOCAL[0], "headers": []}
    asyncio.run(Edge(layer, Settings())(scope, receive, send))
    assert heard == [b"ab", True, True]
    assert asked == 0
