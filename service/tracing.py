"""Spans of OpenTelemetry: where the time of a request went, as children of the span that BentoML makes of it.

BentoML exports its spans when it is told where to, and only then do we make any; requests that are not sampled have
none either. Prompts, seeds and keys are in no span. See docs/operations/service.md.

pip install 'leapfrog[serve,tracing]'
export BENTOML_CONFIG_OVERRIDES='{"services": {"tracing": {"exporter_type": "otlp", "sample_rate": 1.0,
  "otlp": {"protocol": "http", "endpoint": "http://127.0.0.1:4318/v1/traces"}}}}'
bentoml serve
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer

from service.rows import OnStage
from service.settings import SettingsError

logger = logging.getLogger(__name__)

FLUSH_S = 5.0
"""Most that a server which stops waits for a collector."""


@dataclass(frozen=True)
class Trace:
    """One sampled request: makes spans of the stages of its rows, from any thread."""

    tracer: Tracer
    model: str
    steps: int
    parent: Context = field(default_factory=context.get_current)
    epoch_ns: int = field(default_factory=lambda: time.time_ns() - time.perf_counter_ns())
    """Of time.perf_counter, which the stages are timed with."""

    def stage(self, index: int, name: str, begun: float, ended: float, rows: int = 1) -> None:
        """A stage of the row of that index is over; a service.rows.OnStage."""
        about: dict[str, str | int] = {
            "leapfrog.model": self.model,
            "leapfrog.steps": self.steps,
            "leapfrog.row": index,
            "leapfrog.rows": rows,
        }
        span = self.tracer.start_span(name, self.parent, attributes=about, start_time=self._ns(begun))
        span.end(self._ns(ended))

    def _ns(self, seconds: float) -> int:
        return self.epoch_ns + int(seconds * 1e9)


def of_request(tracer: Tracer | None, request_id: str, model: str, steps: int, rows: int) -> OnStage | None:
    """Who makes spans of the stages of the request that is being answered, and tells its own what is asked for.

    None: nobody looks.
    """
    if tracer is None:
        return None
    span = trace.get_current_span()
    if not span.get_span_context().trace_flags.sampled:
        return None
    span.set_attributes(
        {
            "leapfrog.request_id": request_id,
            "leapfrog.model": model,
            "leapfrog.steps": steps,
            "leapfrog.rows": rows,
        }
    )
    return Trace(tracer, model, steps).stage


def open_tracer() -> Tracer | None:
    """What makes our spans, from BentoML's provider; None where it exports none.

    Raises SettingsError when it cannot export, and lets BentoML start without, so that the server can say why.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml.exceptions import BentoMLException

    kind = BentoMLContainer.tracing.exporter_type.get()
    if kind is None:
        return None
    try:
        provider = BentoMLContainer.tracer_provider.get()
    except ModuleNotFoundError as error:
        reason = f"tracing.exporter_type is {kind} and {error.name} is not installed; run: {install_line(kind)}"
    except BentoMLException:
        protocol = BentoMLContainer.tracing[kind].protocol.get()
        reason = f"tracing.{kind}.protocol is {protocol}; say http, or another one that BentoML's manual has"
    else:
        if not BentoMLContainer.tracing.sample_rate.get():
            logger.warning("tracing.sample_rate is 0: only requests whose callers trace them are exported; set it")
        return provider.get_tracer("leapfrog")  # type: ignore[no-any-return]
    BentoMLContainer.tracer_provider.set(TracerProvider())
    raise SettingsError(reason)


def install_line(kind: str) -> str:
    from bentoml._internal.configuration.containers import BentoMLContainer

    ours = kind == "otlp" and BentoMLContainer.tracing.otlp.protocol.get() == "http"
    return "pip install 'leapfrog[tracing]'" if ours else f"pip install 'bentoml[tracing-{kind}]'"


def flush() -> None:
    """Send what is left. A server that is told to stop ends by that signal, without the exporter's own farewell."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    # Daemonic, as the exporter minds no time limit when its collector does not answer.
    sending = threading.Thread(target=BentoMLContainer.tracer_provider.get().force_flush, name="flush", daemon=True)
    sending.start()
    sending.join(FLUSH_S)
