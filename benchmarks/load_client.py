"""The client of the load test: one connection per request, written on bare sockets so that it takes little of the
machine that it shares with the server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.load_traces import Arrival

Outcome = Literal["ok", "rejected", "deadline", "invalid", "cancelled", "disconnected", "failed"]
OUTCOMES: dict[int, Outcome] = {
    200: "ok",
    429: "rejected",
    503: "rejected",
    504: "deadline",
    400: "invalid",
    413: "invalid",
    409: "cancelled",
}
PICTURES, VIDEOS = "/v1/images/generations", "/v1/videos/sync"
TIMEOUT_S = 600.0
LEAVE_S = 0.02
"""A client that leaves or cancels does so this long after sending."""
OVERSIZE_BYTES = 3 << 20
ESTIMATE_EVERY = 10
PREVIEW_EVERY = 20
KEEP_EVERY = 20
"""Every so many answers one is kept, to be compared with what the bare runtime makes."""


@dataclass(frozen=True)
class Target:
    """A server, and what a client may know of it."""

    port: int
    keys: tuple[str, ...] = ()
    """API keys; none: it asks for none."""
    lists: bool = False
    """Whether it takes lists of requests, as BentoML's adaptive batching does."""
    ours: bool = False
    """Whether it knows estimates, streams and cancelling."""


@dataclass(frozen=True)
class Answer:
    status: int
    fields: Mapping[str, str]
    body: bytes
    first_preview_s: float | None = None
    """After sending, of a stream with a preview."""


@dataclass(frozen=True)
class Sent:
    """What became of one arrival. Milliseconds; latency counts from the scheduled time, late_ms is our own delay."""

    arrival: Arrival
    outcome: Outcome
    latency_ms: float
    late_ms: float
    file: bytes | None = None
    """PNG or MP4, of every KEEP_EVERY-th answer."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Milliseconds by stage, where the server tells."""
    eta_ms: float | None = None
    first_preview_ms: float | None = None
    received: int = 0
    """Bytes of the answer's body."""


async def post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of one POST to this machine."""
    answer = await exchange(Target(port), path, body)
    return answer.status, answer.body


async def exchange(target: Target, path: str, body: bytes, key: int = 0, name: str = "") -> Answer:
    """One POST. key: the place of the API key; name: the request's id."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        begun = time.perf_counter()
        writer.write(_head(target, path, len(body), key, name) + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
        status = int(head.split(" ", 2)[1])
        if "content-length" in fields:
            return Answer(status, fields, await reader.readexactly(int(fields["content-length"])))
        whole, preview_s = b"", None
        while size := int(await reader.readline(), 16):
            whole += (await reader.readexactly(size + 2))[:-2]
            if preview_s is None and b"partial_image\n" in whole:
                preview_s = time.perf_counter() - begun
        return Answer(status, fields, whole, preview_s)
    finally:
        writer.close()


def _head(target: Target, path: str, length: int, key: int, name: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"]
    if target.keys:
        lines.append(f"authorization: Bearer {target.keys[key]}")
    if name:
        lines.append(f"x-request-id: {name}")
    return "\r\n".join((*lines, "connection: close", "", "")).encode()


def body_of(arrival: Arrival, deadline_ms: int | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": arrival.prompt, "seed": arrival.seed, "steps": arrival.steps}
    body["cache"] = arrival.cache
    if arrival.frames:
        body["num_frames"] = arrival.frames
    if deadline_ms is not None:
        body["deadline_ms"] = deadline_ms
    if arrival.kind == "invalid":
        body["prompt"] = ""
    elif arrival.kind == "oversize":
        body["prompt"] = "x" * OVERSIZE_BYTES
    return body


async def replay(
    target: Target, arrivals: Sequence[Arrival], *, deadline_ms: Callable[[str], float] | None = None
) -> list[Sent]:
    """Send every arrival at its time and wait for all answers.

    deadline_ms: by the work of an arrival, for a server that knows deadlines. Of ours it is asked every tenth time,
    before sending, when the answer would be there; and every twentieth picture comes as a stream with a preview.
    """
    start = time.perf_counter() + 0.05
    tasks = []
    for index, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        body = body_of(arrival, None if deadline_ms is None else round(deadline_ms(arrival.work)))
        tasks.append(asyncio.create_task(_one(target, index, arrival, body, start + arrival.at)))
    return list(await asyncio.gather(*tasks))


async def _one(target: Target, index: int, arrival: Arrival, body: dict[str, Any], due: float) -> Sent:
    eta_ms, begun = None, time.perf_counter()
    late_ms = (begun - due) * 1e3
    if target.ours and arrival.kind == "ordinary" and index % ESTIMATE_EVERY == 0:
        told = await exchange(target, "/v1/estimate", json.dumps(body).encode(), arrival.key)
        eta_ms = json.loads(told.body).get("eta_ms")
        due = time.perf_counter()  # the clock starts after it: it is the estimate that is judged here
    if target.ours and arrival.kind == "ordinary" and arrival.steps > 1 and not arrival.frames:
        body |= {"stream": True, "partial_images": 1} if index % PREVIEW_EVERY == PREVIEW_EVERY // 2 else {}
    outcome, answer = await _send(target, arrival, body, f"load-{index}")
    latency_ms = (time.perf_counter() - due) * 1e3
    if answer is None:
        return Sent(arrival, outcome, latency_ms, late_ms, eta_ms=eta_ms)
    preview_ms = None if answer.first_preview_s is None else answer.first_preview_s * 1e3
    file, metrics = b"", dict[str, float]()
    if outcome == "ok":
        try:
            file, metrics = parse(answer)
        except (ValueError, KeyError, IndexError):  # a stream that ended in an error has said 200 before
            outcome = "deadline" if b'"deadline_exceeded"' in answer.body else "failed"
    kept = file if file and index % KEEP_EVERY == 0 else None
    return Sent(arrival, outcome, latency_ms, late_ms, kept, metrics, eta_ms, preview_ms, len(answer.body))


def parse(answer: Answer) -> tuple[bytes, dict[str, float]]:
    """The file in an answer and milliseconds by stage. Raises ValueError, KeyError or IndexError if there is none."""
    kind = answer.fields.get("content-type", "")
    if kind.startswith("video/"):
        stages = re.findall(r"(\w+);dur=([\d.]+)", answer.fields.get("server-timing", ""))
        return answer.body, {f"{stage}_ms": float(value) for stage, value in stages}
    if kind.startswith("text/event-stream"):
        (last,) = [line for line in answer.body.split(b"\n\n") if b"image_generation.completed" in line]
        item = found = json.loads(last.partition(b"data: ")[2])
    else:
        found = json.loads(answer.body)
        found = found[0] if isinstance(found, list) else found
        item = found["data"][0]
    told = found.get("metrics") or {}
    return base64.b64decode(item["b64_json"]), {name: told[name] for name in told if name.endswith("_ms")}


async def _send(target: Target, arrival: Arrival, body: dict[str, Any], name: str) -> tuple[Outcome, Answer | None]:
    path = VIDEOS if arrival.frames else PICTURES
    content = json.dumps({"requests": [body]} if target.lists else body).encode()
    try:
        if arrival.kind == "disconnect":
            _, writer = await asyncio.open_connection("127.0.0.1", target.port)
            writer.write(_head(target, path, len(content), arrival.key, name) + content)
            await asyncio.sleep(LEAVE_S)
            writer.close()
            return "disconnected", None
        asked = asyncio.wait_for(exchange(target, path, content, arrival.key, name), TIMEOUT_S)
        if arrival.kind == "cancel" and target.ours:
            answer, _ = await asyncio.gather(asked, _cancel(target, arrival, name))
        else:
            answer = await asked
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return "failed", None
    return OUTCOMES.get(answer.status, "failed"), answer


async def _cancel(target: Target, arrival: Arrival, name: str) -> None:
    """A while after sending. What is done already answers 404; whether it was is seen in the other answer."""
    await asyncio.sleep(LEAVE_S)
    await exchange(target, f"/v1/requests/{name}/cancel", b"", arrival.key)


async def saturate(target: Target, arrivals: Sequence[Arrival], clients: int, seconds: float) -> float:
    """Closed loop: answers per second when ``clients`` clients send as soon as they were answered."""
    end, count, following = time.perf_counter() + seconds, 0, iter(arrivals)

    async def one() -> None:
        nonlocal count
        for arrival in following:
            if time.perf_counter() >= end:
                return
            outcome, _ = await _send(target, arrival, body_of(arrival), "")
            count += outcome == "ok" and time.perf_counter() < end

    await asyncio.gather(*(one() for _ in range(clients)))
    return count / seconds
