"""The forms of an answer, over HTTP and through OpenAI's client: events with previews, bare files, JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.service.conftest import Server

PROMPT = "a large red metal cube"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as connected:
        yield connected


def picture(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def events(server: Server, **body: object) -> list[dict[str, Any]]:
    answer = server.images(stream=True, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n") if not block.startswith(":")]
    assert all(len(block) == 2 for block in blocks)
    data = [json.loads(line.removeprefix("data: ")) for _, line in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in data]
    return data


def test_openai_client_reads_previews_and_then_the_picture(server: Server, client: openai.OpenAI) -> None:
    extra = {"seed": 21, "steps": 4, "cache": False}
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=extra)
    seen = list(stream)
    assert [event.type for event in seen] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    last = seen[-1]
    assert last.type == "image_generation.completed"
    assert last.usage.input_tokens == 5
    assert (last.model_extra or {})["seed"] == 21
    partial = [event for event in seen if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert all(picture(event.b64_json).size == (64, 64) for event in seen)
    assert partial[0].b64_json != partial[1].b64_json
    alone = server.images(prompt=PROMPT, seed=21, steps=4, cache=False).json()
    assert last.b64_json == alone["data"][0]["b64_json"]


def test_openai_client_hears_of_an_error_in_mid_stream(server: Server, client: openai.OpenAI) -> None:
    """Tried until the cancellation arrives while the picture is drawn, which is up to the machine."""
    with ThreadPoolExecutor(6) as pool, httpx.Client(base_url=server.url, timeout=30) as other:
        for attempt in range(50):
            first = {"prompt": PROMPT, "steps": 8, "n": 4, "cache": False, "priority": "high"}
            busy = [pool.submit(server.images, **first) for _ in range(6)]
            name = f"in-mid-stream-{attempt}"
            stream = client.images.generate(
                prompt=PROMPT,
                stream=True,
                partial_images=3,
                extra_body={"steps": 8, "cache": False, "priority": "low"},
                extra_headers={"x-request-id": name},
            )
            told: openai.APIError | None = None
            try:
                for _ in stream:
                    other.post(f"/v1/requests/{name}/cancel")
            except openai.APIError as error:
                told = error
            assert all(answer.result().status_code == 200 for answer in busy)
            if told is not None:
                assert (told.code, told.message) == ("cancelled", "the request was cancelled")
                return
    raise AssertionError("every picture was done before it could be cancelled")


def test_progress_is_told_when_asked_for(server: Server) -> None:
    seen = events(server, prompt=PROMPT, steps=4, progress=True, cache=False)
    told = [event for event in seen if event["type"] == "image_generation.progress"]
    assert told[0]["steps_done"] == 0
    assert {event["steps_done"] for event in told} >= {1, 2, 3}
    assert [event["percent"] for event in told] == sorted(event["percent"] for event in told)
    assert all(event["eta_ms"] >= 0 and event["position"] >= 0 for event in told)
    assert seen[-1]["type"] == "image_generation.completed"
    assert [event["type"] for event in events(server, prompt=PROMPT, steps=4)] == ["image_generation.completed"]


@pytest.mark.parametrize("stream", [True, False])
def test_the_whole_takes_at_least_as_long_as_its_stages(server: Server, stream: bool) -> None:
    """The clock starts when the picture is asked for, not when its answer begins."""
    asked = {"prompt": PROMPT, "steps": 8, "cache": False}
    answer = events(server, **asked)[-1] if stream else server.images(**asked).json()
    timings = answer["metrics"]
    stages = ("queue_ms", "encode_text_ms", "denoise_ms", "decode_ms", "encode_image_ms")
    assert timings["total_ms"] >= sum(timings[name] for name in stages) - 0.05, "each is rounded to 0.01"


def test_a_known_picture_streams_at_once_without_previews(server: Server) -> None:
    server.images(prompt=PROMPT, seed=5, steps=4)
    (only,) = events(server, prompt=PROMPT, seed=5, steps=4, partial_images=3)
    assert only["metrics"]["cache"] == "hit"


def test_a_wrong_stream_gets_a_status_not_an_event(server: Server) -> None:
    assert server.images(prompt="", stream=True).status_code == 400
    assert server.images(prompt=PROMPT, stream=True, deadline_ms=1, cache=False).status_code == 504


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_bare_files_by_accept(server: Server, file_format: str) -> None:
    url = f"{server.url}/v1/images/generations"
    body = {"prompt": PROMPT, "seed": 3, "steps": 2}
    answer = httpx.post(url, json=body, headers={"accept": f"image/{file_format}"}, timeout=30)
    assert answer.headers["content-type"] == f"image/{file_format}"
    assert Image.open(io.BytesIO(answer.content)).format == file_format.upper()
    assert answer.headers["x-seed"] == "3"
    assert "denoise;dur=" in answer.headers["server-timing"]
    as_json = server.images(**body, output_format=file_format).json()
    assert base64.b64decode(as_json["data"][0]["b64_json"]) == answer.content
    anything = httpx.post(url, json={**body, "output_format": file_format}, headers={"accept": "image/*"}, timeout=30)
    assert anything.content == answer.content


@pytest.mark.parametrize(
    ("accept", "body", "status", "param"),
    [
        ("image/png", {"n": 2}, 400, "n"),
        ("image/png", {"stream": True}, 400, "stream"),
        ("image/webp", {"output_format": "png"}, 406, "output_format"),
        ("image/gif", {}, 406, "output_format"),
    ],
)
def test_accept_that_contradicts_the_body(
    server: Server, accept: str, body: dict[str, object], status: int, param: str
) -> None:
    url = f"{server.url}/v1/images/generations"
    answer = httpx.post(url, json={"prompt": PROMPT, **body}, headers={"accept": accept}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_json_unless_a_picture_is_asked_for(server: Server) -> None:
    for accept in ("*/*", "application/json", "text/html,image/webp,application/json", ""):
        url = f"{server.url}/v1/images/generations"
        answer = httpx.post(url, json={"prompt": PROMPT, "steps": 1}, headers={"accept": accept}, timeout=30)
        assert answer.headers["content-type"] == "application/json"
