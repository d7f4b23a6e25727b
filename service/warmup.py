"""The first points of a model's cost curves, measured before it is offered."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Manifest
from distill.sampling import Table, noise
from service.budget import Budget
from service.rows import Served
from service.runtimes.base import Capabilities, Conditioning, Floats, Runtime, stack

logger = logging.getLogger(__name__)

TURNS = 3
"""Steps that are timed where a moment's noise would decide what runs."""


def agreeing(manifest: Manifest, runtime: Runtime, lanes: Sequence[Runtime]) -> tuple[Runtime, ...]:
    """The lanes, if they make the same bits as the runtime: a seed is one picture, whoever computes beside it."""
    if lanes and not all(map(np.array_equal, _all_graphs(manifest, runtime), _all_graphs(manifest, lanes[0]))):
        logger.warning("%s: fewer threads change the last bit here, so steps run one at a time", manifest.name)
        return ()
    return tuple(lanes)


def _all_graphs(manifest: Manifest, runtime: Runtime) -> list[NDArray[np.generic]]:
    """What each graph makes of a prompt and a seed."""
    text = runtime.encode_text([_prompt_of(manifest)])
    table = manifest.samplers[manifest.default_steps].table()
    latents, x0 = runtime.step(*_feed(text, table, manifest.latent_shape(), rows=1))
    return [*text.values(), latents, x0, runtime.decode(x0)]


def _prompt_of(manifest: Manifest) -> str:
    return (manifest.examples or ("a picture",))[0]


def warm_up(budget: Budget, served: Served) -> None:
    """First points of every cost curve, which also lets the runtimes prepare every shape that they will meet.

    Loading has measured the steps of the first size already.
    """
    runtime, name = served.in_company, served.manifest.name
    text = runtime.encode_text([prompt := _prompt_of(served.manifest)])
    start = time.perf_counter()
    runtime.encode_text([prompt])
    budget.observe_text(name, time.perf_counter() - start)
    table = served.tables[served.manifest.default_steps]
    for each in (runtime, served.runtime) if served.lanes else (runtime,):
        for k, key in enumerate(served.keys.values()):
            for exact, times in _times(each.capabilities):
                kind = key._replace(exact=exact)
                if not budget.knows(kind):
                    continue  # lanes keep every bit in all their batches, so all rows are of the other kind
                each.configure(exact=exact)
                for rows, milliseconds in times:
                    decides = bool(served.lanes) and rows == 1  # between a lane and all cores
                    turns = TURNS if decides else 1
                    measured = k == 0 and not decides
                    seconds = milliseconds / 1e3 if measured else _time_step(each, text, table, key.shape, rows, turns)
                    budget.observe(kind, rows, seconds, wide=each is not runtime)
            latents = noise(0, 0, key.shape)
            each.decode(latents)
            start = time.perf_counter()
            each.decode(latents)
            budget.observe_decode(key, time.perf_counter() - start)
        each.configure()


def _times(able: Capabilities) -> list[tuple[bool, list[tuple[int, float]]]]:
    """Batch sizes with the milliseconds of a step: of rows that keep every bit, and of others where they differ."""
    exact = (True, list(zip(able.batch_sizes, able.step_ms, strict=True)))
    loose = (False, list(zip(able.loose_sizes, able.loose_ms, strict=True)))
    return [exact, loose] if able.loose_sizes else [exact]


def _time_step(
    runtime: Runtime, text: Conditioning, table: Table, shape: tuple[int, ...], rows: int, turns: int
) -> float:
    """Seconds of the fastest of ``turns`` steps after the first, which may compile."""
    feed, times = _feed(text, table, shape, rows), []
    runtime.step(*feed)
    for _ in range(turns):
        start = time.perf_counter()
        runtime.step(*feed)
        times.append(time.perf_counter() - start)
    return min(times)


def _feed(
    text: Conditioning, table: Table, shape: tuple[int, ...], rows: int
) -> tuple[Floats, Floats, Floats, Floats, Conditioning]:
    """Arguments of Runtime.step for the first step of some seeds."""
    latents = np.concatenate([noise(seed, 0, shape) for seed in range(rows)])
    times = np.full(rows, table.timesteps[0], dtype=np.float32)
    return latents, times, np.tile(table.rows[0], (rows, 1)), latents, stack([text] * rows)
