"""Clients that leave: does the service lose a place or a picture?

    python -m benchmarks.aborts bundles/scenes-sdxl --aborts 1000 --after 100

Sends requests as JSON, as streams and for bare files, and leaves each after a random time: by closing the connection in
the middle of the request, of the answer or in between, or by cancelling it. Then the queue must run empty by itself,
and every picture that is asked for afterwards must be that of the bare runtime, byte for byte. The result goes beside
this file as JSON; exit code 1 when a place was lost or a picture was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.latency import processor
from benchmarks.load_client import post
from benchmarks.load_servers import served_outcomes, start
from distill.bundle import Bundle
from service.encode import encode
from service.runtimes import generate, open_runtime

FORMS = ("json", "stream", "file")
WAYS = ("in the request", "while it waits", "in the answer", "by cancelling")
CLIENTS = 16
LONGEST_S = 0.15
"""Most time between sending a request and leaving."""
EMPTY_S = 60.0


async def abort(port: int, number: int, steps: Sequence[int]) -> str:
    """Send one request and leave it. Returns how."""
    dice = random.Random(number)
    form, way, wait = dice.choice(FORMS), dice.choice(WAYS), dice.uniform(0, LONGEST_S)
    body = {"prompt": f"a red cube {number}", "seed": number, "steps": dice.choice(list(steps)), "cache": False}
    content = json.dumps(body | ({"stream": True, "partial_images": 3} if form == "stream" else {})).encode()
    accept = "image/png" if form == "file" else "application/json"
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"accept: {accept}\r\nx-request-id: abort-{number}\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if way == "in the request":
            writer.write(head + content[: dice.randrange(len(content))])
            await writer.drain()
            await asyncio.sleep(wait)
            return way
        writer.write(head + content)
        await writer.drain()
        if way == "in the answer":
            await reader.read(dice.randrange(1, 200))
        else:
            await asyncio.sleep(wait)
        if way == "by cancelling":
            await post(port, f"/v1/requests/abort-{number}/cancel", b"")
    except ConnectionError:
        return f"{way}, refused"
    finally:
        writer.transport.abort()  # a reset, as of a process that was killed
    return way


async def abort_all(port: int, count: int, steps: Sequence[int]) -> Counter[str]:
    numbers, left = iter(range(count)), Counter[str]()

    async def client() -> None:
        for number in numbers:
            left[await abort(port, number, steps)] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return left


def busy(port: int) -> int:
    """Pictures that wait or run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/queue", timeout=30) as answer:
        return sum(device["waiting"] + device["running"] for device in json.load(answer)["data"])


def drain(port: int) -> tuple[float, int]:
    """Seconds until nothing waits or runs, and what is left after EMPTY_S."""
    begun = time.perf_counter()
    while (left := busy(port)) and time.perf_counter() - begun < EMPTY_S:
        time.sleep(0.01)
    return time.perf_counter() - begun, left


async def ask(port: int, count: int, steps: Sequence[int]) -> list[tuple[int, bytes]]:
    """(steps, picture) of ``count`` requests, CLIENTS at a time; seeds are their numbers."""
    numbers, found = iter(range(count)), dict[int, tuple[int, bytes]]()

    async def client() -> None:
        for number in numbers:
            taken = steps[number % len(steps)]
            body = json.dumps({"prompt": "a blue ball", "seed": number, "steps": taken, "cache": False}).encode()
            status, answer = await post(port, "/v1/images/generations", body)
            picture = base64.b64decode(json.loads(answer)["data"][0]["b64_json"]) if status == 200 else b""
            found[number] = (taken, picture)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [found[number] for number in range(count)]


def measure(path: Path, aborts: int, after: int, threads: int, port: int) -> dict[str, Any]:
    bundle = Bundle.open(path)
    steps = sorted(count for count in bundle.manifest.samplers if count <= 8)
    with start("ours", path, threads, port):
        left = asyncio.run(abort_all(port, aborts, steps))
        seconds, lost = drain(port)
        outcomes = served_outcomes(port)
        pictures = asyncio.run(ask(port, after, steps))
    runtime = open_runtime(bundle, threads=threads, max_batch=8)
    wrong = 0
    for seed, (taken, picture) in enumerate(pictures):
        wrong += picture != encode(generate(runtime, bundle.manifest, ["a blue ball"], [seed], taken)[0], "png")
    return {
        "bundle": bundle.manifest.name,
        "digest": bundle.digest,
        "aborts": aborts,
        "left": dict(sorted(left.items())),
        "outcomes_that_the_server_counted": {name: count for name, count in sorted(outcomes.items()) if count},
        "seconds_until_empty": round(seconds, 3),
        "places_lost": lost,
        "asked_afterwards": after,
        "wrong_afterwards": wrong,
        "threads": threads,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aborts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--aborts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--after", type=int, default=100, help="requests afterwards; default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of one graph run")
    parser.add_argument("--port", type=int, default=3480, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aborts.json")
    args = parser.parse_args(arguments)
    result = measure(args.bundle, args.aborts, args.after, args.threads, args.port)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"wrote {args.out}", file=sys.stderr)
    return 1 if result["places_lost"] or result["wrong_afterwards"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
