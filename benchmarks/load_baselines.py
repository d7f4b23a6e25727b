"""Servers with other policies for the load test: the same runtime, pictures, encoder and wire format as ours.

    python -m benchmarks.load_baselines serial bundles/scenes-sdxl --port 3001

serial: one request at a time behind a lock, as FastVideo's and LightX2V's servers do.
batching: request-level dynamic batching, as in sglang's ``--batching-mode dynamic``: requests with the same number of
steps that wait together run together from the first to the last step; nobody joins or leaves in between.

Both have a bounded queue and give up requests whose client has left before they begin. A bundle of videos answers
with clips, as ours does at /v1/videos/sync.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from benchmarks.load_client import PICTURES, VIDEOS
from benchmarks.load_sums import file_of
from distill.bundle import Bundle
from service.runtimes import Runtime, generate, open_runtime
from service.runtimes.base import Images

Policy = Literal["serial", "batching"]
DELAY_S = 0.005
"""How long an idle server waits for company before it begins."""
LARGEST_PROMPT = 2000


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    prompt: str
    seed: int
    steps: int
    frames: int
    """Of a clip; 0: a picture."""
    result: asyncio.Future[Images]
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0


class Server:
    """A queue and one loop that takes requests from it."""

    def __init__(self, bundle: Bundle, runtime: Runtime, policy: Policy, max_batch: int, max_queue: int) -> None:
        self.manifest, self.runtime = bundle.manifest, runtime
        self.max_batch = 1 if policy == "serial" else max_batch
        self.delay_s = 0.0 if policy == "serial" else DELAY_S
        self.max_queue = max_queue
        self.queue: deque[Waiting] = deque()
        self.arrived = asyncio.Event()
        self.model = ThreadPoolExecutor(1)
        self.encoders = ThreadPoolExecutor(2)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            if len(self.queue) < self.max_batch and self.delay_s:
                await asyncio.sleep(self.delay_s)
            batch = self.take()
            if not batch:
                continue
            try:
                pictures = await loop.run_in_executor(self.model, self.compute, batch)
            except Exception as error:
                for request in batch:
                    if not request.result.done():
                        request.result.set_exception(error)
                continue
            for request, picture in zip(batch, pictures, strict=True):
                if not request.result.done():
                    request.result.set_result(picture)

    def take(self) -> list[Waiting]:
        """The oldest request and those after it with as many steps and frames."""
        alive = [request for request in self.queue if not request.result.done()]
        alike = [request for request in alive if (request.steps, request.frames) == (alive[0].steps, alive[0].frames)]
        batch = alike[: self.max_batch]
        self.queue = deque(request for request in alive if request not in batch)
        if not self.queue:
            self.arrived.clear()
        return batch

    def compute(self, batch: list[Waiting]) -> Images:
        prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
        for request in batch:
            request.begun = time.perf_counter()
        return generate(self.runtime, self.manifest, prompts, seeds, batch[0].steps, frames=batch[0].frames or None)

    async def answer(self, request: Request) -> Response:
        asked = await request.json()
        if len(self.queue) >= self.max_queue:
            return JSONResponse({"error": {"code": "queue_full"}}, 429)
        if not 0 < len(asked["prompt"]) <= LARGEST_PROMPT:
            return JSONResponse({"error": {"code": "invalid_value"}}, 400)
        loop = asyncio.get_running_loop()
        frames = asked.get("num_frames", 0)
        waiting = Waiting(asked["prompt"], asked["seed"], asked["steps"], frames, loop.create_future())
        self.queue.append(waiting)
        self.arrived.set()
        while not (await asyncio.wait({waiting.result}, timeout=0.05))[0]:
            if await request.is_disconnected():
                waiting.result.cancel()
                return JSONResponse({}, 408)
        data = await loop.run_in_executor(self.encoders, file_of, waiting.result.result(), self.manifest)
        queue_ms = (waiting.begun - waiting.arrived) * 1e3
        total_ms = (time.perf_counter() - waiting.arrived) * 1e3
        if frames:
            timing = f"queue;dur={queue_ms:.1f}, total;dur={total_ms:.1f}"
            return Response(data, media_type="video/mp4", headers={"server-timing": timing})
        item = {"b64_json": base64.b64encode(data).decode("ascii"), "seed": waiting.seed}
        return JSONResponse({"data": [item], "metrics": {"queue_ms": queue_ms, "total_ms": total_ms}})


def build(bundle: Bundle, policy: Policy, *, threads: int, max_batch: int = 8, max_queue: int = 64) -> FastAPI:
    """The application of one policy."""
    runtime = open_runtime(bundle, threads=threads, max_batch=max_batch)

    @asynccontextmanager
    async def lifespan(app: FastAPI):  # type: ignore[no-untyped-def]
        app.state.server = server = Server(bundle, runtime, policy, max_batch, max_queue)
        loop = asyncio.create_task(server.run())
        yield
        loop.cancel()

    web = FastAPI(lifespan=lifespan)

    @web.post(VIDEOS if bundle.manifest.frames else PICTURES)
    async def generations(request: Request) -> Response:
        server: Server = request.app.state.server
        return await server.answer(request)

    @web.get("/readyz")
    async def ready() -> JSONResponse:
        return JSONResponse({})

    return web


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_baselines",
        description="A server with another policy than ours.",
        epilog="example: python -m benchmarks.load_baselines serial bundles/scenes-sdxl --port 3001",
    )
    parser.add_argument("policy", choices=("serial", "batching"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    web = build(Bundle.open(options.bundle), options.policy, threads=options.threads)
    uvicorn.run(web, host="127.0.0.1", port=options.port, log_level="warning", ws="none")


if __name__ == "__main__":
    main()
