"""Lines of the log as JSON: one object per line, with the request that it is about."""

from __future__ import annotations

import json
import logging
import sys

from opentelemetry.sdk.trace import TracerProvider

from service.logs import REQUEST, JsonLines


def line(text: str, *values: object, **extra: object) -> dict[str, str]:
    record = logging.getLogger("service.test").makeRecord(
        "service.test", logging.WARNING, "file", 1, text, values, None, extra=dict(extra)
    )
    formatted = JsonLines().format(record)
    assert "\n" not in formatted
    return dict(json.loads(formatted))


def test_a_line_is_one_object() -> None:
    found = line("a %s\nin two lines — %d", "picture", 7)
    assert found.pop("time").endswith("+00:00")
    assert found == {"level": "warning", "logger": "service.test", "message": "a picture\nin two lines — 7"}


def test_lines_tell_their_request() -> None:
    token = REQUEST.set("req_1")
    try:
        assert line("here")["request_id"] == "req_1"
        assert line("of another thread", request_id="req_2")["request_id"] == "req_2"
    finally:
        REQUEST.reset(token)
    assert "request_id" not in line("of nobody")


def test_lines_within_a_trace_tell_it() -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
        told = line("here")["trace_id"]
    assert int(told, 16) == span.get_span_context().trace_id and len(told) == 32


def test_exceptions_are_in_the_object() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    assert "ValueError: no" in json.loads(JsonLines().format(record))["exception"]
