"""Lines of the log, as text like BentoML's or as one JSON object each, with the id of the request they are about."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace

REQUEST: ContextVar[str] = ContextVar("request", default="")
"""Id of the request that is being answered; lines of other threads give theirs as ``extra={"request_id": …}``."""
TEXT = logging.Formatter("%(asctime)s [%(levelname)s] [%(name)s] %(message)s", "%Y-%m-%dT%H:%M:%S%z")


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"}, and where there are any "request_id", "trace_id" and "exception"."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", "") or REQUEST.get():
            line["request_id"] = request_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = trace.format_trace_id(span.trace_id)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(form: str) -> None:
    """All lines of the service go to standard error; ``form`` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TEXT)
    ours = logging.getLogger("service")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
