"""The running server, through the clients that people use."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from service.encode import encode
from service.runtimes import OnnxRuntime, generate
from tests.service.conftest import REPOSITORY, Server, tree

PROMPT = "a large red metal cube"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as connected:
        yield connected


def png_of(answer: httpx.Response, index: int = 0) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][index]["b64_json"])


def metric(server: Server, name: str) -> float:
    """The sum over all labels of a metric."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def assert_envelope(answer: httpx.Response, status: int) -> dict[str, str | None]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return dict(error)


def test_openai_client_draws_pictures(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, size="64x64", extra_body={"seed": 7, "steps": 2})
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    assert answer.usage is not None
    assert answer.usage.input_tokens == 5
    assert answer.data is not None
    assert [(item.model_extra or {})["seed"] for item in answer.data] == [7, 8]
    for item in answer.data:
        assert item.b64_json is not None
        assert Image.open(io.BytesIO(base64.b64decode(item.b64_json))).size == (64, 64)
    timings = (answer.model_extra or {})["metrics"]
    stages = ("queue_ms", "encode_text_ms", "denoise_ms", "decode_ms", "encode_image_ms", "total_ms")
    assert all(timings[stage] >= 0 for stage in stages)
    assert timings["total_ms"] >= timings["denoise_ms"] > 0
    assert timings["steps"] == 2


def test_openai_client_lists_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny-sdxl"]
    capabilities = (client.models.retrieve("tiny-sdxl").model_extra or {})["capabilities"]
    assert capabilities["steps"] == [1, 2, 4, 8]
    assert capabilities["sizes"] == ["64x64"]
    assert (capabilities["runtime"], capabilities["precision"]) == ("onnx", "float32")
    assert capabilities["runtime_version"] == version("onnxruntime")
    with pytest.raises(openai.NotFoundError, match="tiny-sdxl"):
        client.models.retrieve("nothing")


def test_openai_client_hears_that_pictures_cannot_be_edited(client: openai.OpenAI) -> None:
    capabilities = (client.models.retrieve("tiny-sdxl").model_extra or {})["capabilities"]
    assert capabilities["image_edits"] is False
    for size in (100, 3 << 20):
        with pytest.raises(openai.BadRequestError, match="use POST /v1/images/generations") as refused:
            client.images.edit(image=("a.png", b"x" * size, "image/png"), prompt=PROMPT)
        assert (refused.value.code, refused.value.param) == ("unsupported_operation", "image")


def test_openai_client_gets_errors_that_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, extra_body={"sead": 7})
    assert (refused.value.param, refused.value.code) == ("sead", "unknown_parameter")
    assert refused.value.request_id


def test_bento_client_draws_the_same_picture(server: Server, tmp_path: Path) -> None:
    """In a process of its own: importing BentoML's client warns of its own deprecations, which are errors here."""
    file = tmp_path / "picture.png"
    code = (
        "import bentoml, sys\n"
        "with bentoml.SyncHTTPClient(sys.argv[1]) as client:\n"
        f"    image = client.generate(prompt={PROMPT!r}, seed=7, steps=2)\n"
        "    image.save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, server.url, str(file)], check=True, timeout=60)
    over_openai = Image.open(io.BytesIO(png_of(server.images(prompt=PROMPT, seed=7, steps=2))))
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(over_openai))


def test_bento_api_errors_come_in_the_envelope(server: Server) -> None:
    for body, param in (({"prompt": "", "seed": 1}, "prompt"), ({"prompt": "x", "seed": -1}, "seed"), ({}, "prompt")):
        assert assert_envelope(httpx.post(f"{server.url}/generate", json=body), 400)["param"] == param
    assert_envelope(httpx.post(f"{server.url}/generate", content=b'{"prompt"'), 400)


def test_server_and_plain_loop_give_the_same_file(server: Server, runtime: OnnxRuntime) -> None:
    expected = encode(generate(runtime, runtime.manifest, [PROMPT], [11], steps=4)[0], "png")
    assert png_of(server.images(prompt=PROMPT, seed=11, steps=4)) == expected


def test_a_seed_gives_the_same_bytes_alone_and_under_load(server: Server) -> None:
    wishes = [(seed, steps) for seed in range(6) for steps in (1, 2, 4, 8)]
    alone = {wish: png_of(server.images(prompt=PROMPT, seed=wish[0], steps=wish[1])) for wish in wishes}
    with ThreadPoolExecutor(len(wishes)) as pool:
        ask = lambda wish: server.images(prompt=PROMPT, seed=wish[0], steps=wish[1], cache=False)  # noqa: E731
        answers = list(pool.map(ask, wishes))
    assert max(answer.json()["metrics"]["batch"] for answer in answers) > 1
    for wish, answer in zip(wishes, answers, strict=True):
        assert png_of(answer) == alone[wish]
    several = server.images(prompt=PROMPT, seed=0, steps=4, n=4, cache=False)
    for i in range(4):
        assert png_of(several, i) == alone[i, 4]


def test_drawn_seed_is_returned_and_repeats_the_picture(server: Server) -> None:
    first = server.images(prompt=PROMPT, steps=1)
    again = server.images(prompt=PROMPT, steps=1, seed=first.json()["data"][0]["seed"])
    assert png_of(again) == png_of(first)


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_other_formats(server: Server, file_format: str) -> None:
    answer = server.images(prompt=PROMPT, output_format=file_format, output_compression=80)
    assert answer.json()["output_format"] == file_format
    assert Image.open(io.BytesIO(png_of(answer))).format == file_format.upper()


def test_truncated_prompt_is_reported(server: Server) -> None:
    answer = server.images(prompt="red " * 40, steps=1).json()
    assert answer["warnings"] == ["prompt was truncated: it has 40 tokens, tiny-sdxl reads the first 14"]
    assert answer["usage"]["input_tokens"] == 14
    assert server.images(prompt=PROMPT, steps=1).json()["warnings"] == []


def test_ignored_fields_are_listed(server: Server) -> None:
    assert server.images(prompt=PROMPT, user="me", moderation="low").json()["ignored"] == ["user", "moderation"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/models/x", 404, "model_not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("DELETE", "/generate", 405, "method_not_allowed"),
        ("POST", "/v1/images/variations", 404, "not_found"),
        ("GET", "/../../etc/passwd", 404, "not_found"),
    ],
)
def test_unknown_paths_and_methods_come_in_the_envelope(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    answer = httpx.request(method, server.url + path)
    assert assert_envelope(answer, status)["code"] == code
    assert status != 405 or answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b'{"prompt": ', "application/json", 400, "invalid_json"),
        (b"\xff\xff", "application/json", 400, "invalid_json"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "invalid_value"),
        (b'{"prompt": "a", "model": "b"}', "application/json; charset=utf-8", 404, "model_not_found"),
    ],
)
def test_malformed_bodies(server: Server, content: bytes, content_type: str, status: int, code: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", content=content, headers={"content-type": content_type})
    assert assert_envelope(answer, status)["code"] == code


def test_oversized_bodies_are_refused_declared_and_chunked(server: Server) -> None:
    url, headers = f"{server.url}/v1/images/generations", {"content-type": "application/json"}
    body = json.dumps({"prompt": "x" * (3 << 20)}).encode()
    declared = httpx.post(url, content=body, headers=headers, timeout=30)
    assert assert_envelope(declared, 413)["code"] == "request_too_large"
    chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
    chunked = httpx.post(url, content=chunks, headers=headers, timeout=30)
    assert assert_envelope(chunked, 413)["code"] == "request_too_large"


def test_request_ids_are_kept_or_made(server: Server) -> None:
    given = httpx.get(f"{server.url}/livez", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    strange = httpx.get(f"{server.url}/livez", headers={"x-request-id": "a b<c>"})
    assert strange.headers["x-request-id"].startswith("req_")


def test_metrics_count_requests_with_bounded_labels(server: Server) -> None:
    images, invalid = metric(server, "leapfrog_images_total"), metric(server, "leapfrog_requests_total")
    server.images(prompt=PROMPT, n=2, steps=1)
    server.images(prompt="")
    assert metric(server, "leapfrog_images_total") == images + 2
    assert metric(server, "leapfrog_requests_total") == invalid + 2
    for i in range(20):
        server.get(f"/scan/{i}.php")
        server.get(f"/v1/models/{i}")
    text = server.get("/metrics").text
    assert ".php" not in text
    assert 'endpoint="/v1/models/{id}"' in text
    assert 'endpoint="/v1/models/7"' not in text
    assert metric(server, "leapfrog_queue_rows") == 0


def test_memory_of_the_process_is_measured_when_it_is_asked_for(server: Server) -> None:
    text = server.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("leapfrog_device_memory_bytes{")]
    assert [line.rsplit(" ", 1)[0] for line in lines] == ['leapfrog_device_memory_bytes{device="cpu",kind="resident"}']
    resident = max(process.memory_info().rss for process in tree(server.process.pid))
    assert float(lines[0].rsplit(" ", 1)[1]) == pytest.approx(resident, rel=0.2)


def test_pictures_of_clients_that_leave_are_given_up(server: Server) -> None:
    cancelled = metric(server, "leapfrog_cancelled_rows_total")
    body = json.dumps({"prompt": PROMPT, "n": 4, "steps": 8}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    request = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request += b"content-length: %d\r\n\r\n" % len(body) + body
    sockets = [socket.create_connection((host, int(port))) for _ in range(16)]
    for connection in sockets:
        connection.sendall(request)
    for connection in sockets:
        connection.close()
    deadline = time.monotonic() + 20
    while metric(server, "leapfrog_cancelled_rows_total") == cancelled and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(server, "leapfrog_cancelled_rows_total") > cancelled
    assert png_of(server.images(prompt=PROMPT, seed=1, steps=1))


def test_start_and_memory_are_cheap(server: Server) -> None:
    """Well within what is promised for the shipped model, ready in ten seconds and 700 MB."""
    assert server.start_cpu_s is not None
    assert server.start_cpu_s < 10
    assert sum(process.memory_info().rss for process in tree(server.process.pid)) < 700e6


def test_health(server: Server) -> None:
    assert server.get("/livez").status_code == server.get("/readyz").status_code == 200


def test_listens_on_loopback_and_sends_no_telemetry_by_default() -> None:
    code = (
        "import os; os.environ.pop('BENTOML_DO_NOT_TRACK', None)\n"
        "import service.app as app\n"
        "from bentoml._internal.utils.analytics.usage_stats import do_not_track\n"
        "http = app.Leapfrog.config['http']\n"
        "print(do_not_track(), http['host'], http['port'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "127.0.0.1", "3000"]


def test_the_service_needs_no_torch() -> None:
    code = "import sys, service.app; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_bentofile_includes_what_the_service_imports() -> None:
    import yaml

    listed = yaml.safe_load((REPOSITORY / "bentofile.yaml").read_text())
    code = (
        "import sys, service.app; print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'distill'))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = {Path(name).relative_to(REPOSITORY).as_posix() for name in result.stdout.split()}
    assert files <= set(listed["include"])
