"""The model as a method of a BentoML service, over the same runtime, pictures and encoder as ours, for the load test.

    LEAPFROG_BUNDLES=bundles/scenes-sdxl bentoml serve benchmarks.load_bentoml:Naive

Naive: one call of the model per request in BentoML's worker thread, as BentoDiffusion's services around a diffusers
pipeline do. Adaptive: the same method with ``batchable=True``, BentoML's adaptive batching; what arrives together runs
together, by number of steps.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bentoml
from pydantic import BaseModel, Field

from distill.bundle import Bundle
from service.encode import encode
from service.runtimes import generate, open_runtime

ROUTE = "/v1/images/generations"
MAX_BATCH = 8


class Ask(BaseModel):
    """What the clients send; they ask for no cache here, so that it changes nothing."""

    prompt: str = Field(min_length=1, max_length=2000)
    seed: int
    steps: int
    cache: bool = False


class Drawer:
    """A bundle and its runtime, as a pipeline in a notebook would be."""

    def __init__(self) -> None:
        self.bundle = Bundle.open(Path(os.environ["LEAPFROG_BUNDLES"]))
        self.runtime = open_runtime(self.bundle, threads=int(os.environ["LEAPFROG_THREADS"]), max_batch=MAX_BATCH)

    def draw(self, asked: Sequence[Ask]) -> list[dict[str, Any]]:
        """Answers in the order of the requests; those with as many steps run together."""
        made: dict[int, dict[str, Any]] = {}
        for steps in {ask.steps for ask in asked}:
            places = [i for i, ask in enumerate(asked) if ask.steps == steps]
            prompts, seeds = [asked[i].prompt for i in places], [asked[i].seed for i in places]
            pictures = generate(self.runtime, self.bundle.manifest, prompts, seeds, steps)
            for i, picture in zip(places, pictures, strict=True):
                data = base64.b64encode(encode(picture, "png")).decode("ascii")
                made[i] = {"data": [{"b64_json": data, "seed": asked[i].seed}]}
        return [made[i] for i in range(len(asked))]


@bentoml.service(name="naive", traffic={"timeout": 3600}, logging={"access": {"enabled": False}})
class Naive:
    def __init__(self) -> None:
        self.drawer = Drawer()

    @bentoml.api(route=ROUTE)  # type: ignore[untyped-decorator]
    def draw(self, ask: Ask, /) -> dict[str, Any]:
        return self.drawer.draw([ask])[0]


@bentoml.service(name="adaptive", traffic={"timeout": 3600}, logging={"access": {"enabled": False}})
class Adaptive:
    def __init__(self) -> None:
        self.drawer = Drawer()

    @bentoml.api(route=ROUTE, batchable=True, max_batch_size=MAX_BATCH)  # type: ignore[untyped-decorator]
    def draw(self, requests: list[Ask]) -> list[dict[str, Any]]:
        return self.drawer.draw(requests)
