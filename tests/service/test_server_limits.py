"""Servers that refuse: API keys, a full queue, a damaged bundle, an unusable setting, a slow body, an orderly end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from distill.bundle import Bundle
from tests.service.conftest import Server, serve

PROMPT = "a red cube"
KEYS = "alpha-key,beta-key"


@pytest.fixture(scope="module")
def strict(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"api_keys": KEYS, "max_queue": 1, "max_batch": 1, "max_n": 1, "body_timeout_s": 1}
    with serve(tiny_bundle, tmp_path_factory.mktemp("strict") / "home", **limits) as running:
        yield running


def ask(server: Server, **body: object) -> httpx.Response:
    headers = {"authorization": "Bearer beta-key"}
    return httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize("value", [None, "Bearer wrong", "Bearer", "alpha-key", "Basic alpha-key", "Bearer alpha-ke"])
def test_without_a_key_nothing_is_computed(strict: Server, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value}
    for method, path in (("POST", "/v1/images/generations"), ("GET", "/v1/models"), ("POST", "/generate")):
        answer = httpx.request(method, strict.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["x-request-id"]


def test_page_and_health_are_open(strict: Server) -> None:
    for path in ("/", "/livez", "/readyz", "/metrics"):
        assert strict.get(path).status_code == 200


def test_each_key_opens(strict: Server) -> None:
    for key in KEYS.split(","):
        with openai.OpenAI(base_url=f"{strict.url}/v1", api_key=key, max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny-sdxl"
    with (
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_full_queue_answers_429_with_the_time_to_wait(strict: Server) -> None:
    """Whether requests meet is up to the machine, so they are sent until some do; no cache may answer for them."""
    answers: list[httpx.Response] = []
    with ThreadPoolExecutor(24) as pool:
        while {answer.status_code for answer in answers} != {200, 429} and len(answers) < 50 * 24:
            answers += pool.map(lambda _: ask(strict, prompt=PROMPT, seed=3, steps=8, cache=False), range(24))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    pictures = {answer.json()["data"][0]["b64_json"] for answer in answers if answer.status_code == 200}
    assert len(pictures) == 1
    assert ask(strict, prompt=PROMPT).status_code == 200


def test_openai_client_retries_until_there_is_a_place(strict: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="alpha-key", max_retries=50) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(lambda _: client.images.generate(prompt=PROMPT), range(6)))
    assert all(answer.data for answer in answers)


def test_a_body_that_never_ends_is_given_up(strict: Server) -> None:
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alpha-key\r\n"
            b'content-type: application/json\r\ncontent-length: 100\r\n\r\n{"prompt"'
        )
        answer = connection.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0]


def test_a_damaged_bundle_is_told_by_readyz_and_one_log_line(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundles" / "tiny"
    shutil.copytree(tiny_bundle, root)
    file = root / Bundle.open(root).engine("step").file
    file.write_bytes(file.read_bytes()[:-100])
    with serve(root.parent, tmp_path / "home", ready=False) as server:
        answer = server.get("/readyz")
        assert answer.status_code == 503
        assert "step" in answer.json()["error"]["message"]
        assert "altered or truncated" in answer.json()["error"]["message"]
        assert server.get("/livez").status_code == 503
        refused = server.images(prompt=PROMPT)
        assert refused.status_code == 503
        assert file.name in refused.json()["error"]["message"]
        assert server.get("/").status_code == 200
    log = server.log.read_text()
    assert "Traceback" not in log
    assert sum(file.name in line for line in log.splitlines()) == 1


def test_an_unusable_setting_is_told_instead_of_crashing(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve(tiny_bundle, tmp_path / "home", ready=False, max_bach=3) as server:
        assert "did you mean LEAPFROG_MAX_BATCH?" in server.get("/readyz").json()["error"]["message"]


def test_sigterm_finishes_what_was_taken_and_ends_in_order(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve(tiny_bundle, tmp_path / "home", max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        ask = lambda seed: server.images(prompt=PROMPT, seed=seed, steps=8, n=4, cache=False)  # noqa: E731
        answers = [pool.submit(ask, 10 * k) for k in range(8)]
        while sum(server.get("/v1/queue").json()["data"][0][kind] for kind in ("waiting", "running")) < 8:
            assert not all(answer.done() for answer in answers), "they were done before there was anything to finish"
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result(60).status_code for answer in answers] == [200] * 8
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_lines_of_the_log_are_objects_that_tell_their_request(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve(tiny_bundle, tmp_path / "home", log="json") as server:
        body = {"prompt": PROMPT, "seed": 1, "steps": 1}
        headers = {"x-request-id": "mine-1"}
        assert httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers).status_code == 200
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert any(line["message"].startswith("loaded tiny-sdxl") and "request_id" not in line for line in lines)
    [drawn] = [line for line in lines if line.get("request_id") == "mine-1"]
    assert (drawn["level"], drawn["logger"]) == ("info", "service.answers")
    assert PROMPT not in server.log.read_text()
