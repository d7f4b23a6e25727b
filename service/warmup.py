"""The first points of a model's cost curves, measured before it is offered."""

from __future__ import annotations

import time

import numpy as np

from distill.sampling import Table, noise
from service.budget import Budget
from service.rows import Served
from service.runtimes.base import Capabilities, Conditioning, Runtime, stack


def warm_up(budget: Budget, served: Served) -> None:
    """First points of every cost curve, which also lets the runtime prepare every shape that it will meet.

    Loading has measured the steps of the first size already.
    """
    runtime, able, name = served.runtime, served.runtime.capabilities, served.manifest.name
    text = runtime.encode_text([prompt := (served.manifest.examples or ("a picture",))[0]])
    start = time.perf_counter()
    runtime.encode_text([prompt])
    budget.observe_text(name, time.perf_counter() - start)
    table = served.tables[served.manifest.default_steps]
    for k, key in enumerate(served.keys.values()):
        for exact, times in _times(able):
            runtime.configure(exact=exact)
            for rows, milliseconds in times:
                seconds = milliseconds / 1e3 if k == 0 else _time_step(runtime, text, table, key.shape, rows)
                budget.observe(key._replace(exact=exact), rows, seconds)
        latents = noise(0, 0, key.shape)
        runtime.decode(latents)
        start = time.perf_counter()
        runtime.decode(latents)
        budget.observe_decode(key, time.perf_counter() - start)
    runtime.configure()


def _times(able: Capabilities) -> list[tuple[bool, list[tuple[int, float]]]]:
    """Batch sizes with the milliseconds of a step: of rows that keep every bit, and of others where they differ."""
    exact = (True, list(zip(able.batch_sizes, able.step_ms, strict=True)))
    loose = (False, list(zip(able.loose_sizes, able.loose_ms, strict=True)))
    return [exact, loose] if able.loose_sizes else [exact]


def _time_step(runtime: Runtime, text: Conditioning, table: Table, shape: tuple[int, ...], rows: int) -> float:
    """Seconds of the second of two steps: the first one may compile."""
    latents = np.concatenate([noise(seed, 0, shape) for seed in range(rows)])
    times = np.full(rows, table.timesteps[0], dtype=np.float32)
    feed = (latents, times, np.tile(table.rows[0], (rows, 1)), latents, stack([text] * rows))
    runtime.step(*feed)
    start = time.perf_counter()
    runtime.step(*feed)
    return time.perf_counter() - start
