"""The client of the load test: one connection per request, written on bare sockets so that it takes little of the
machine that it shares with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.load_traces import Arrival

Outcome = Literal["ok", "rejected", "deadline", "invalid", "disconnected", "failed"]
OUTCOMES = {200: "ok", 429: "rejected", 504: "deadline", 400: "invalid", 413: "invalid"}
TIMEOUT_S = 600.0
LEAVE_S = 0.02
"""A client that leaves does so this long after sending."""
OVERSIZE_BYTES = 3 << 20
ESTIMATE_EVERY = 10


@dataclass(frozen=True)
class Sent:
    """What became of one arrival. Milliseconds; latency counts from the scheduled time, late_ms is our own delay."""

    arrival: Arrival
    outcome: Outcome
    latency_ms: float
    late_ms: float
    b64_json: str | None = None
    metrics: dict[str, Any] | None = None
    eta_ms: float | None = None


async def post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of one POST to this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_head(path, len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        if (length := fields.get(b"content-length")) is None:
            raise ConnectionError(f"{path} answered without a content-length")
        return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length))
    finally:
        writer.close()


def _head(path: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}")
    return "\r\n".join((*lines, "connection: close", "", "")).encode()


def body_of(arrival: Arrival, deadline_ms: int | None = None) -> bytes:
    body: dict[str, Any] = {"prompt": arrival.prompt, "seed": arrival.seed, "steps": arrival.steps}
    body["cache"] = arrival.cache
    if deadline_ms is not None:
        body["deadline_ms"] = deadline_ms
    if arrival.kind == "invalid":
        body["prompt"] = ""
    elif arrival.kind == "oversize":
        body["prompt"] = "x" * OVERSIZE_BYTES
    return json.dumps(body).encode()


async def replay(
    port: int, arrivals: Sequence[Arrival], *, deadline_ms: Callable[[int], int] | None = None, estimates: bool = False
) -> list[Sent]:
    """Send every arrival at its time and wait for all answers.

    deadline_ms: of a number of steps, for servers that know deadlines. estimates: ask every tenth time, before sending,
    when the picture would be done.
    """
    start = time.perf_counter() + 0.05
    bodies = [body_of(a, None if deadline_ms is None else deadline_ms(a.steps)) for a in arrivals]

    async def one(index: int) -> Sent:
        arrival, body, eta_ms = arrivals[index], bodies[index], None
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        begun = time.perf_counter()
        if estimates and index % ESTIMATE_EVERY == 0 and arrival.kind == "picture":
            _, told = await post(port, "/v1/estimate", body)
            eta_ms = json.loads(told).get("eta_ms")
            begun = time.perf_counter()
        outcome, answer = await _send(port, arrival, body)
        now = time.perf_counter()
        item = (answer.get("data") or [{}])[0]
        return Sent(
            arrival,
            outcome,
            # With an estimate the clock starts after it: it is the estimate that is judged there.
            (now - (begun if eta_ms is not None else start + arrival.at)) * 1e3,
            (begun - start - arrival.at) * 1e3,
            item.get("b64_json"),
            answer.get("metrics"),
            eta_ms,
        )

    return list(await asyncio.gather(*(one(i) for i in range(len(arrivals)))))


async def _send(port: int, arrival: Arrival, body: bytes) -> tuple[Outcome, dict[str, Any]]:
    path = "/v1/images/generations"
    try:
        if arrival.kind == "disconnect":
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_head(path, len(body)) + body)
            await asyncio.sleep(LEAVE_S)
            writer.close()
            return "disconnected", {}
        status, answer = await asyncio.wait_for(post(port, path, body), TIMEOUT_S)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return "failed", {}
    return OUTCOMES.get(status, "failed"), json.loads(answer) if status == 200 else {}  # type: ignore[return-value]


async def saturate(port: int, arrivals: Sequence[Arrival], clients: int, seconds: float) -> float:
    """Closed loop: answers per second when ``clients`` clients send as soon as they were answered."""
    end, count, following = time.perf_counter() + seconds, 0, iter(arrivals)

    async def one() -> None:
        nonlocal count
        for arrival in following:
            if time.perf_counter() >= end:
                return
            outcome, _ = await _send(port, arrival, body_of(arrival))
            count += outcome == "ok" and time.perf_counter() < end

    await asyncio.gather(*(one() for _ in range(clients)))
    return count / seconds
