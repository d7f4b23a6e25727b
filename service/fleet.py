"""Several engines with copies of the same models, one per GPU or per share of a processor's cores, as if they were one.

A row goes to the engine that has the least seconds of work, so the pictures of one request may be made side by side; a
seed gives the same picture on each. Queues, fairness and limits are each engine's own.

    fleet = Fleet("cpu", [Engine("cpu:0", max_queue=64), Engine("cpu:1", max_queue=64)])
    fleet.add("scenes-sdxl", runtimes, manifest)                  # one runtime per engine
    rows = fleet.submit(order)                                    # as Engine.submit
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from distill.bundle import Manifest
from service.engine import Engine
from service.rows import Order, Picture, QueueFull
from service.runtimes.base import Runtime
from service.scheduler import Forecast, together


class Fleet:
    """The interface of service.engine.Engine over one or more of them."""

    def __init__(self, device: str, engines: Sequence[Engine]) -> None:
        self.device, self.engines = device, tuple(engines)
        self._turn = threading.Lock()
        """Two orders at once must not find the same engine idle."""

    @property
    def replicas(self) -> int:
        return len(self.engines)

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self.engines)

    @property
    def models(self) -> list[str]:
        return self.engines[0].models

    def add(
        self, name: str, runtimes: Sequence[Runtime], manifest: Manifest, lanes: Sequence[Sequence[Runtime]] = ()
    ) -> None:
        """A runtime, and perhaps those of its lanes, per engine; see Engine.add."""
        for engine, runtime, beside in zip(self.engines, runtimes, lanes or [()] * self.replicas, strict=True):
            engine.add(name, runtime, manifest, beside)

    def lane_count(self, model: str) -> int:
        """As Engine.lane_count, of each."""
        return self.engines[0].lane_count(model)

    def submit(self, order: Order) -> list[Future[Picture]]:
        """As Engine.submit: all rows are queued or none."""
        with self._turn:
            parts = self._parts(order)
            placed: dict[int, Future[Picture]] = {}
            try:
                for engine, indices in parts:
                    placed |= zip(indices, self._place(engine, part_of(order, indices)), strict=True)
            except Exception:
                for future in placed.values():
                    future.cancel()
                raise
        return [placed[index] for index in range(len(order.seeds))]

    def forecast(self, order: Order) -> Forecast:
        """As Engine.forecast: done with the last row."""
        told = [engine.forecast(part_of(order, indices)) for engine, indices in self._parts(order)]
        return together(told)

    def expected_s(self, model: str, forecast_s: float) -> float:
        return self.engines[0].expected_s(model, forecast_s)

    def observe_answer(self, model: str, seconds: float) -> None:
        for engine in self.engines:
            engine.observe_answer(model, seconds)

    def cost_s(self, order: Order) -> float:
        return self.engines[0].cost_s(order)

    def decode_s(self, order: Order) -> float:
        return self.engines[0].decode_s(order)

    def outlook(self, futures: list[Future[Picture]]) -> Forecast:
        """As Engine.outlook; rows that an engine does not have count as done there."""
        told = [engine.outlook(futures) for engine in self.engines if any(engine.holds(future) for future in futures)]
        return together(told)

    def holds(self, future: Future[Picture]) -> bool:
        return any(engine.holds(future) for engine in self.engines)

    def load(self) -> tuple[int, int, float]:
        """(pictures that wait, pictures that have begun, seconds until all is done if they share well)."""
        waiting, begun, work_s = zip(*(engine.load() for engine in self.engines), strict=True)
        return sum(waiting), sum(begun), sum(work_s) / len(self.engines)

    def close(self, timeout_s: float = 30.0) -> None:
        """As Engine.close; all of them at once."""
        closing = [threading.Thread(target=engine.close, args=(timeout_s,)) for engine in self.engines]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _parts(self, order: Order) -> list[tuple[Engine, tuple[int, ...]]]:
        """Which rows of an order go to which engine: one by one to where there is least to do."""
        work = [engine.load()[2] for engine in self.engines]
        row_s = self.engines[0].cost_s(replace(order, seeds=order.seeds[:1]))
        rows: list[list[int]] = [[] for _ in self.engines]
        for index in range(len(order.seeds)):
            least = min(range(len(work)), key=lambda i: work[i])
            rows[least].append(index)
            work[least] += row_s
        return [(engine, tuple(some)) for engine, some in zip(self.engines, rows, strict=True) if some]

    def _place(self, engine: Engine, order: Order) -> list[Future[Picture]]:
        """Queue a part where it should go, else anywhere that has a place. Raises the earliest QueueFull."""
        refused: list[QueueFull] = []
        for each in (engine, *(other for other in self.engines if other is not engine)):
            try:
                return each.submit(order)
            except QueueFull as full:
                refused.append(full)
        raise min(refused, key=lambda full: full.retry_after_s)


def part_of(order: Order, indices: tuple[int, ...]) -> Order:
    """An order for some of the seeds, whose callbacks still tell the index in the whole."""
    if len(indices) == len(order.seeds):
        return order
    seeds = tuple(order.seeds[index] for index in indices)
    step, begin, frames, stage = order.on_step, order.on_begin, order.on_frames, order.on_stage
    return replace(
        order,
        seeds=seeds,
        on_step=None if step is None else partial(_renumbered, step, indices),
        on_begin=None if begin is None else partial(_renumbered, begin, indices),
        on_frames=None if frames is None else partial(_renumbered, frames, indices),
        on_stage=None if stage is None else partial(_renumbered, stage, indices),
    )


def _renumbered(tell: Callable[..., None], indices: tuple[int, ...], index: int, *news: object) -> None:
    tell(indices[index], *news)


Engines = Engine | Fleet
"""What a model is computed by."""
