"""The OpenAPI document: every answer of a live server follows it, whatever is sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi import checks

from distill.bundle import Manifest
from service.edge import KNOWN_PATHS, TEMPLATES
from service.openapi import PICTURES, VIDEO, document, request, video_request
from service.schemas import ImageRequest
from service.settings import Settings
from service.video_request import VideoRequest
from tests.service.conftest import Server

FOLLOWED = [
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
    checks.unsupported_method,
]


TEMPLATED = {template for _, template in TEMPLATES}
OPERATIONS = ("listModels", "getModel", "createImage", "estimate", "getQueue", "cancelRequest", "editImage", "realtime")
OPERATIONS += ("listLoras", "registerLora", "deleteLora")
VIDEO_OPERATIONS = ("createVideo", "createVideoAtOnce", "listVideos", "getVideo", "deleteVideo", "cancelVideo")
VIDEO_OPERATIONS += ("getVideoContent", "followVideo")
BUDGET = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def operations(server: Server) -> dict[str, Any]:
    described = schemathesis.openapi.from_url(f"{server.url}/v1/openapi.json")
    found = [result.ok() for result in described.get_all_operations()]
    return {operation.definition.raw["operationId"]: operation for operation in found}


def test_every_route_is_described(server: Server) -> None:
    """Schemathesis leaves out the document's own."""
    assert set(operations(server)) == {*OPERATIONS, *VIDEO_OPERATIONS}
    paths = server.get("/v1/openapi.json").json()["paths"]
    assert {re.sub(r"\{\w+\}", "{id}", path) for path in paths} == {p for p in KNOWN_PATHS | TEMPLATED if "/v1/" in p}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_makes_the_server_fail_or_leave_its_document(server: Server, name: str) -> None:
    hold_against(server, name)


@pytest.mark.parametrize("name", VIDEO_OPERATIONS)
def test_no_request_for_videos_does_either(video_server: Server, name: str) -> None:
    hold_against(video_server, name)


def test_a_server_without_videos_says_so(server: Server) -> None:
    for name in VIDEO_OPERATIONS[:2]:
        path = "/v1/videos" + ("/sync" if name == "createVideoAtOnce" else "")
        answer = httpx.post(server.url + path, json={"prompt": "a cube"})
        assert answer.status_code == 400 and "no model of this server makes videos" in answer.text
    assert server.get("/v1/videos").json()["data"] == []


def hold_against(server: Server, name: str) -> None:
    @BUDGET
    @given(case=operations(server)[name].as_strategy())
    def hold(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(checks=FOLLOWED, timeout=60)
        # A deadline that cannot be met is told as 504, which is the caller's wish and no failure.
        assert answer.status_code < 500 or answer.json()["error"]["code"] == "deadline_exceeded"

    hold()


@pytest.fixture
def body(manifest: Manifest) -> Any:
    found = request(Settings(max_n=2, max_prompt_chars=40), [manifest])
    definitions = {"$defs": found.get("$defs", {})}
    return jsonschema_rs.validator_for({**found, **definitions})


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ({"prompt": "a cube"}, True),
        ({"prompt": "a cube", "steps": None, "seed": None, "size": None}, True),
        ({"prompt": "a cube", "steps": 4, "size": "64x64", "model": "tiny-sdxl"}, True),
        ({"prompt": "a cube", "num_inference_steps": 4}, True),
        ({"prompt": "a cube", "num_inference_steps": 4, "steps": 4}, False),
        ({"prompt": "a cube", "steps": 3}, False),
        ({"prompt": "a cube", "size": "32x32"}, False),
        ({"prompt": "a cube", "model": "other"}, False),
        ({"prompt": "a cube", "n": 3}, False),
        ({"prompt": "a cube", "n": 2, "stream": True}, False),
        ({"prompt": " "}, False),
        ({"prompt": "x" * 41}, False),
        ({"prompt": None}, False),
        ({"prompt": "a cube", "response_format": "url"}, False),
        ({"prompt": "a cube", "stepz": 4}, False),
    ],
)
def test_the_document_knows_the_limits_of_this_server(body: Any, given: dict[str, Any], valid: bool) -> None:
    assert body.is_valid(given) == valid


def test_the_document_lists_every_field_that_requests_take(manifest: Manifest) -> None:
    listed = request(Settings(), [manifest])["properties"]
    assert set(listed) == set(ImageRequest.model_fields) | {"num_inference_steps"}
    assert all(entry.get("description") for entry in listed.values())


def test_pictures_follow_the_document_cached_or_not(server: Server) -> None:
    validator = jsonschema_rs.validator_for(PICTURES)
    for _ in range(2):
        answer = server.images(prompt="a blue cube", seed=11, n=2, style="vivid")
        validator.validate(answer.json())
    assert answer.json()["metrics"]["cache"] == "hit" and answer.json()["ignored"] == ["style"]


def test_videos_follow_the_document(video_server: Server) -> None:
    validator = jsonschema_rs.validator_for(VIDEO)
    answer = httpx.post(f"{video_server.url}/v1/videos", json={"prompt": "a blue cube", "seed": 11, "user": "me"})
    validator.validate(answer.json())
    followed = httpx.get(f"{video_server.url}/v1/videos/{answer.json()['id']}/events", timeout=60)
    done = json.loads(followed.text.rstrip().rsplit("data: ", 1)[1])
    assert done.pop("type") == "video.completed"
    validator.validate(done)


def test_the_document_lists_every_field_of_videos() -> None:
    listed = video_request(Settings(), [])["properties"]
    assert set(listed) == set(VideoRequest.model_fields) | {"num_inference_steps"}
    assert all(entry.get("description") for entry in listed.values())


def test_keys_are_asked_for_where_the_server_asks_for_them(manifest: Manifest) -> None:
    assert document(Settings(), [manifest])["security"] == []
    keyed = document(Settings(api_keys=("alpha",)), [manifest])
    assert keyed["security"] == [{"key": []}] and "alpha" not in json.dumps(keyed)


def test_whole_numbers_may_be_written_with_a_point(server: Server) -> None:
    """JSON has one kind of number, and JSON Schema counts 4.0 as an integer."""

    def post(steps: str) -> httpx.Response:
        content = f'{{"prompt": "a cube", "seed": 5.0, "steps": {steps}}}'
        kind = {"content-type": "application/json"}
        return httpx.post(f"{server.url}/v1/images/generations", content=content, headers=kind, timeout=60)

    assert post("2.0").json()["data"] == server.images(prompt="a cube", seed=5, steps=2).json()["data"]
    assert post("2.5").status_code == 400 and "steps is 2.5" in post("2.5").text
    assert post("1e400").status_code == 400


def test_the_document_is_served_before_models_are(tmp_path: Path) -> None:
    found = document(Settings(bundles=tmp_path))
    bodies = found["paths"]["/v1/estimate"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert all("enum" not in body["properties"]["size"]["anyOf"][0] for body in bodies)
