"""WS /v1/realtime through a real server: the newest prompt wins, and who may connect."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_ws import WebSocketDisconnect, WebSocketSession, WebSocketUpgradeError, connect_ws
from PIL import Image

from tests.service.conftest import Server, serve

PROMPT = "a large red metal cube"
WAIT_S = 60.0


@contextmanager
def session(server: Server, **more: Any) -> Iterator[WebSocketSession]:
    with httpx.Client(timeout=WAIT_S) as client, connect_ws(f"{server.url}/v1/realtime", client, **more) as socket:
        yield socket


def told(socket: WebSocketSession) -> dict[str, Any]:
    return dict(json.loads(socket.receive_text(timeout=WAIT_S)))


def frame(socket: WebSocketSession) -> tuple[dict[str, Any], bytes]:
    about = told(socket)
    assert about["type"] == "frame", about
    data = socket.receive_bytes(timeout=WAIT_S)
    assert about["bytes"] == len(data)
    return about, data


def say(socket: WebSocketSession, **message: Any) -> None:
    socket.send_text(json.dumps({"type": "prompt", **message}))


def end_of(socket: WebSocketSession) -> int:
    """The code with which the server ends a session."""
    with pytest.raises(WebSocketDisconnect) as ended:
        socket.receive_text(timeout=WAIT_S)
    return ended.value.code


@pytest.fixture(scope="module")
def keyed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"api_keys": "alpha,beta", "max_sessions": 1, "session_idle_s": 2}
    with serve(tiny_bundle, tmp_path_factory.mktemp("realtime") / "home", **limits) as running:
        yield running


def test_each_prompt_becomes_the_picture_of_a_plain_request(server: Server) -> None:
    with session(server) as socket:
        hello = told(socket)
        assert (hello["type"], hello["models"], hello["image_to_image"]) == ("session.created", ["tiny-sdxl"], False)
        for name, prompt in (("a", PROMPT), ("b", "a small blue rubber sphere")):
            say(socket, id=name, prompt=prompt, seed=7, steps=2, output_format="png")
            about, data = frame(socket)
            assert (about["id"], about["seed"], about["size"], about["dropped"]) == (name, 7, "64x64", 0)
            headers = {"accept": "image/png"}
            body = {"prompt": prompt, "seed": 7, "steps": 2}
            assert data == httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers).content
        say(socket, prompt=PROMPT, steps=1)
        assert Image.open(io.BytesIO(frame(socket)[1])).format == "JPEG"


def test_the_newest_prompt_wins_and_stale_ones_are_dropped(server: Server) -> None:
    count = 40
    with session(server) as socket:
        told(socket)
        for k in range(count):
            say(socket, id=str(k), prompt=PROMPT, seed=k, steps=8, cache=False)
        seen, dropped = [], 0
        while not seen or seen[-1] != count - 1:
            about, _ = frame(socket)
            seen.append(int(about["id"]))
            dropped += about["dropped"]
    assert seen == sorted(seen)
    assert len(seen) + dropped == count
    assert dropped > 0


def test_a_wrong_prompt_is_told_and_the_session_goes_on(server: Server) -> None:
    with session(server) as socket:
        told(socket)
        for message, param, code in (
            ({"prompt": ""}, "prompt", "invalid_value"),
            ({"prompt": PROMPT, "stepz": 1}, "stepz", "unknown_parameter"),
            ({"prompt": PROMPT, "n": 2}, "n", "unknown_parameter"),
            ({"prompt": PROMPT, "steps": 3}, "steps", "invalid_value"),
            ({"prompt": PROMPT, "image": "data:"}, "image", "unsupported_operation"),
            ({"prompt": PROMPT, "model": "other"}, "model", "model_not_found"),
            ({"prompt": PROMPT, "id": 7}, "id", "invalid_value"),
            ({"type": "sing"}, "type", "invalid_value"),
        ):
            socket.send_text(json.dumps({"type": "prompt", **message}))
            answer = told(socket)
            assert (answer["type"], answer["error"]["param"], answer["error"]["code"]) == ("error", param, code)
        for text in ("{", "[]", '{"type": "prompt", "prompt": "\\ud800"}'):
            socket.send_text(text)
            assert told(socket)["error"]["type"] == "invalid_request_error"
        say(socket, prompt=PROMPT, steps=1)
        frame(socket)


def test_what_is_too_long_ends_the_session(server: Server) -> None:
    with session(server) as socket:
        told(socket)
        socket.send_text("x" * 20_000)
        assert end_of(socket) == 1009


def test_stop_ends_the_session(server: Server) -> None:
    with session(server) as socket:
        told(socket)
        socket.send_text('{"type": "stop"}')
        assert end_of(socket) == 1000


def test_keys_are_asked_for_in_the_header_or_among_the_protocols(keyed: Server) -> None:
    for more in (
        {},
        {"headers": {"authorization": "Bearer gamma"}},
        {"subprotocols": ["realtime", "openai-insecure-api-key.gamma"]},
    ):
        with pytest.raises(WebSocketUpgradeError), session(keyed, **more):
            pass
    with session(keyed, headers={"authorization": "Bearer alpha"}) as socket:
        assert told(socket)["type"] == "session.created"
    with session(keyed, subprotocols=["realtime", "openai-insecure-api-key.beta"]) as socket:
        assert told(socket)["type"] == "session.created"
        assert socket.subprotocol == "realtime"


def test_pages_of_other_hosts_are_refused(server: Server) -> None:
    with pytest.raises(WebSocketUpgradeError), session(server, headers={"origin": "https://evil.example"}):
        pass
    with session(server, headers={"origin": server.url}) as socket:
        assert told(socket)["type"] == "session.created"


def test_sessions_are_counted_limited_and_end_when_they_are_silent(keyed: Server) -> None:
    headers = {"authorization": "Bearer alpha"}
    with session(keyed, headers=headers) as first:
        told(first)
        assert "leapfrog_realtime_sessions 1.0" in keyed.get("/metrics").text
        with session(keyed, headers=headers) as second:
            assert told(second)["error"]["code"] == "queue_full"
            assert end_of(second) == 1013
        assert end_of(first) == 1000
    assert "leapfrog_realtime_sessions 0.0" in keyed.get("/metrics").text


def test_a_plain_request_is_told_what_it_is(server: Server) -> None:
    answer = server.get("/v1/realtime")
    assert (answer.status_code, answer.json()["error"]["code"]) == (426, "upgrade_required")


def test_unknown_sockets_are_refused(server: Server) -> None:
    with (
        httpx.Client() as client,
        pytest.raises(WebSocketUpgradeError),
        connect_ws(f"{server.url}/v1/nothing", client),
    ):
        pass
