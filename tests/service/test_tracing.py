"""Spans of real requests to a real server, as a collector gets them over OTLP/HTTP."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from service import tracing
from tests.service.conftest import REPOSITORY, Server, serve

PROMPT = "a large red metal cube"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNTRACED = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIP, JOB = "1" * 32, "2" * 32


class Collector(ThreadingHTTPServer):
    """What is sent to /v1/traces, as it came and as spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def spans(self, trace: str) -> list[Span]:
        return [span for span in self.every() if span.trace_id.hex() == trace]

    def every(self) -> list[Span]:
        sent = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [s for request in sent for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]

    def services(self) -> set[str]:
        sent = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        resources = [r.resource for request in sent for r in request.resource_spans]
        return {a.value.string_value for r in resources for a in r.attributes if a.key == "service.name"}


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf":
            self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def about(span: Span) -> dict[str, str | int]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def milliseconds(*spans: Span) -> float:
    return sum(span.end_time_unix_nano - span.start_time_unix_nano for span in spans) / 1e6


def documented(collector: str) -> str:
    """The value that the manual gives BENTOML_CONFIG_OVERRIDES, with another collector in it."""
    text = (REPOSITORY / "docs" / "operations" / "service.md").read_text()
    [value] = re.findall(r"export BENTOML_CONFIG_OVERRIDES='(.*)'", text)
    assert (REPOSITORY / "service" / "tracing.py").read_text().replace("\n  ", " ").count(value) == 1
    return re.sub(r"http://127\.0\.0\.1:\d+/v1/traces", collector, value)


@contextmanager
def traced(config: str, bundles: Path, home: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Iterator[Server]:
    """A server that sends no span by itself for an hour, but when it stops."""
    monkeypatch.setenv("BENTOML_CONFIG_OVERRIDES", config)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    with serve(bundles, home, threads=1, max_batch=2, log="json", **how) as running:
        yield running


def post(server: Server, path: str, trace: str, sampled: bool = True, **body: object) -> httpx.Response:
    headers = {"traceparent": f"00-{trace}-{PARENT}-{'01' if sampled else '00'}"}
    answer = httpx.post(server.url + path, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def finish(server: Server, job: str) -> None:
    deadline = time.monotonic() + 30
    while (status := httpx.get(f"{server.url}/v1/videos/{job}").json()["status"]) != "completed":
        assert status in ("queued", "in_progress") and time.monotonic() < deadline, status
        time.sleep(0.05)


@pytest.mark.slow
def test_a_collector_sees_where_the_time_of_a_request_went(
    collector: Collector, tiny_bundle: Path, tiny_video_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles, images = tmp_path / "bundles", "/v1/images/generations"
    bundles.mkdir()
    for bundle in (tiny_bundle, tiny_video_bundle):
        (bundles / bundle.name).symlink_to(bundle)
    with traced(documented(collector.url), bundles, tmp_path / "home", monkeypatch) as server:
        answer = post(server, images, TRACE, prompt=PROMPT, n=2, steps=2, seed=7)
        post(server, images, UNTRACED, sampled=False, prompt=PROMPT, steps=1)
        post(server, "/v1/videos/sync", CLIP, prompt=PROMPT, steps=2)
        finish(server, post(server, "/v1/videos", JOB, prompt=PROMPT, steps=2).json()["id"])
        assert collector.bodies == []
    spans, timings = collector.spans(TRACE), answer.json()["metrics"]

    [request] = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (request.name, request.parent_span_id.hex()) == (f"POST {images}", PARENT)
    told = {"model": "tiny-sdxl", "steps": 2, "rows": 2, "request_id": answer.headers["x-request-id"]}
    assert about(request).items() >= {f"leapfrog.{key}": value for key, value in told.items()}.items()
    assert about(request)["http.status_code"] == 200

    stages = [span for span in spans if "leapfrog.row" in about(span)]
    assert {span.parent_span_id for span in stages} == {request.span_id}
    names = {"queue": 2, "encode_text": 2, "denoise": 4, "decode": 2, "encode_image": 2}
    assert Counter(span.name for span in stages) == names
    for span in stages:
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
        shared = {"leapfrog.model": "tiny-sdxl", "leapfrog.steps": 2}
        assert about(span).items() >= shared.items()
    for name, timed in (("encode_text", "encode_text_ms"), ("denoise", "denoise_ms"), ("decode", "decode_ms")):
        of_rows = [[s for s in stages if s.name == name and about(s)["leapfrog.row"] == row] for row in (0, 1)]
        assert max(milliseconds(*some) for some in of_rows) == pytest.approx(timings[timed], abs=0.02)
    batches = {about(span)["leapfrog.rows"] for span in stages if span.name == "denoise"}
    assert max(int(rows) for rows in batches) == timings["batch"]

    for trace in (CLIP, JOB):
        [request] = [span for span in collector.spans(trace) if span.kind == Span.SPAN_KIND_SERVER]
        stages = [span for span in collector.spans(trace) if "leapfrog.row" in about(span)]
        names = {"queue": 1, "encode_text": 1, "denoise": 2, "decode": 1, "encode_video": 1}
        assert Counter(span.name for span in stages) == names
        assert {span.parent_span_id for span in stages} == {request.span_id}

    assert collector.services() == {"leapfrog"}
    assert collector.spans(UNTRACED) == []
    assert not [span.name for span in collector.every() if re.search("readyz|livez|metrics", span.name)]
    assert not any(word.encode() in body for body in collector.bodies for word in PROMPT.split() if len(word) > 3)

    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    mine = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
    assert mine and {line["trace_id"] for line in mine} == {TRACE}


@pytest.mark.parametrize(
    ("told", "hidden", "said"),
    [
        ({"protocol": "http"}, "opentelemetry.exporter", "is not installed; run: pip install 'leapfrog[tracing]'"),
        ({}, "nothing", "tracing.otlp.protocol is None; say http"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_served(
    told: dict[str, str],
    hidden: str,
    said: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{hidden!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config = {"services": {"tracing": {"exporter_type": "otlp", "sample_rate": 1.0, "otlp": told}}}
    with traced(json.dumps(config), tiny_bundle, tmp_path / "home", monkeypatch, ready=False) as server:
        for path in ("/readyz", "/livez"):
            answer = server.get(path)
            assert answer.status_code == 503 and said in answer.json()["error"]["message"]
    log = server.log.read_text()
    assert log.count(said) == 1 and "Traceback" not in log


def test_only_sampled_requests_of_servers_that_export_are_followed() -> None:
    kept = InMemorySpanExporter()
    provider, deaf = TracerProvider(), TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("test")
    assert tracing.of_request(tracer, "req_1", "tiny", 4, 1) is None, "there is no request"
    with deaf.get_tracer("test").start_as_current_span("request"):
        assert tracing.of_request(tracer, "req_1", "tiny", 4, 1) is None
    with tracer.start_as_current_span("request") as request:
        assert tracing.of_request(None, "req_1", "tiny", 4, 1) is None
        followed = tracing.of_request(tracer, "req_1", "tiny", 4, 1)
    assert followed is not None
    followed(0, "decode", 1.0, 1.25, 1)
    [ended, stage] = kept.get_finished_spans()
    assert ended.attributes is not None and ended.attributes["leapfrog.request_id"] == "req_1"
    assert stage.parent == request.get_span_context()
    assert stage.start_time is not None and stage.end_time == stage.start_time + 250_000_000
