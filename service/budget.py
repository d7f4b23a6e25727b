"""What computing costs here: seconds per denoising call by kind of work and batch size, measured, never assumed.

Warm-up gives the first points of each curve and every call after that moves them, so the curve follows the machine.
The one table answers every question about time: how many rows a batch should have, when a row will be done, when a
refused client should come back, and which deadline cannot be met.

    budget = Budget()
    budget.know(key, sizes=(1, 2, 4, 8))
    budget.observe(key, rows=4, seconds=0.067)
    budget.sizes(key)            # batch sizes that pay, e.g. (1, 2, 4)

Where a model has several lanes, its calls are of two kinds: in a lane, beside others, and wide, on all cores.

Nothing here reads a clock or takes a lock; the engine's lock guards it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

EASE = 0.1
"""Weight of the newest measurement in a moving average."""
PAYS = 0.85
"""A batch size pays up to the smallest one that has this part of the best rate; beyond it rows only wait longer.

At 0.8 of capacity on two cores, where four rows together have 1.1 times the rate of one, 45 % of answers were within
twice the time alone, and 23 % at 0.95; no less was done per second when more came than could be.
"""
PROBE_EVERY = 64
"""Every so many calls the next larger size may be tried, so that a measurement of a bad moment is not for good."""
PROBE_WIDE_EVERY = 8
"""The same of a call on all cores that seems to be slower than one in a lane: nothing else would measure it again."""
GUESS_S = 0.05
"""Of one row's step before anything was measured."""


class BatchKey(NamedTuple):
    """Rows with the same key may share a batch, wherever they stand and however many steps they take."""

    model: str
    runtime: str
    shape: tuple[int, ...]
    """Of the latents of one row: (C, h, w), of a clip (C, f, h, w)."""
    guidance: float = 1.0
    exact: bool = True
    """Whether batches must keep every bit."""
    loras: tuple[tuple[str, float], ...] = ()
    """Digests and scales of what rows wear; they change what is computed and not what it costs."""


@dataclass
class _Curve:
    """Seconds per call by number of rows, with the sizes that the runtime takes in one call."""

    sizes: tuple[int, ...]
    limit: int
    lanes: int = 1
    seconds: dict[int, float] = field(default_factory=dict)
    wide: dict[int, float] = field(default_factory=dict)
    decode_s: float | None = None
    calls: int = 0
    worth: tuple[int, ...] | None = None
    """What ``Budget.sizes`` said since the last measurement; it is asked for every row of the queue at every step."""


class Budget:
    """Cost curves of everything that is served."""

    def __init__(self) -> None:
        self._curves: dict[BatchKey, _Curve] = {}
        self._text: dict[str, float] = {}
        self._answer: dict[str, float] = {}

    def know(self, key: BatchKey, sizes: tuple[int, ...], lanes: int = 1) -> None:
        """Begin a curve.

        sizes: the numbers of rows that the runtime computes in one call, from 1 up; lanes: how many calls at once.
        """
        self._curves[_cost(key)] = _Curve(sizes, sizes[-1], lanes)

    def knows(self, key: BatchKey) -> bool:
        return _cost(key) in self._curves

    def observe(self, key: BatchKey, rows: int, seconds: float, *, wide: bool = False) -> None:
        """One denoising call of ``rows`` rows took ``seconds``; wide: on all cores at once instead of in a lane."""
        curve = self._curves[_cost(key)]
        curve.calls, curve.worth = curve.calls + 1, None
        points = curve.wide if wide else curve.seconds
        points[rows] = _eased(points.get(rows), seconds)

    def observe_text(self, model: str, seconds: float) -> None:
        self._text[model] = _eased(self._text.get(model), seconds)

    def observe_decode(self, key: BatchKey, seconds: float) -> None:
        curve = self._curves[_cost(key)]
        curve.decode_s = _eased(curve.decode_s, seconds)

    def observe_answer(self, model: str, seconds: float) -> None:
        """From a request's arrival to its answer it took this much more than in the engine."""
        self._answer[model] = _eased(self._answer.get(model), seconds)

    def expected_s(self, model: str, forecast_s: float) -> float:
        """When an answer will be there whose rows have such a forecast: the text and the work around the engine too."""
        return self.text_s(model) + forecast_s + self._answer.get(model, 0.0)

    def halve(self, key: BatchKey, rows: int) -> int:
        """Memory ran out at ``rows`` rows: from now on at most the largest size of half as many. Returns that size."""
        curve = self._curves[_cost(key)]
        curve.limit = max((size for size in curve.sizes if size <= max(1, rows // 2)), default=1)
        curve.worth = None
        return curve.limit

    def step_s(self, key: BatchKey, rows: int) -> float:
        """Seconds of one call of ``rows`` rows: measured, or in proportion to the nearest measured size.

        A shape that was never measured costs in proportion to its latents, from another shape of the same model.
        """
        seconds = self._curves[_cost(key)].seconds
        if not seconds:
            return rows * self._row_guess(key)
        if rows in seconds:
            return seconds[rows]
        nearest = min(seconds, key=lambda size: abs(size - rows))
        return seconds[nearest] * rows / nearest

    def lanes(self, key: BatchKey) -> int:
        """How many calls the model takes at once."""
        return self._curves[_cost(key)].lanes

    def wide_s(self, key: BatchKey, rows: int) -> float:
        """Seconds of one call on all cores; infinite where it was never measured, or there is no such call.

        A shape that was never measured so is as much faster than in a lane as another shape of the same model.
        """
        curve = self._curves[_cost(key)]
        if curve.wide or curve.lanes == 1:
            return curve.wide.get(rows, float("inf"))
        for other, known in self._curves.items():
            if other.model == key.model and rows in known.wide:
                return self.step_s(key, rows) * known.wide[rows] / self.step_s(other, rows)
        return float("inf")

    def wide_pays(self, key: BatchKey, rows: int) -> bool:
        """Whether one call on all cores ends before each of these rows does in a lane; else it is tried sometimes."""
        wide_s, curve = self.wide_s(key, rows), self._curves[_cost(key)]
        tried = rows in curve.wide and curve.calls % PROBE_WIDE_EVERY == PROBE_WIDE_EVERY - 1
        return tried or wide_s < self.step_s(key, 1)

    def sizes(self, key: BatchKey) -> tuple[int, ...]:
        """Batch sizes worth using, rising; the last one is the cap."""
        curve = self._curves[_cost(key)]
        if curve.worth is not None:
            return curve.worth
        allowed = [size for size in curve.sizes if size <= curve.limit]
        rates = [size / self.step_s(key, size) for size in allowed]
        enough = PAYS * max(rates)
        cap = next(i for i, rate in enumerate(rates) if rate >= enough)
        if curve.calls % PROBE_EVERY == PROBE_EVERY - 1:
            cap = min(cap + 1, len(allowed) - 1)
        found = tuple(allowed[: cap + 1])
        curve.worth = found if curve.seconds else None  # a guess follows the curves of other shapes
        return found

    def row_step_s(self, key: BatchKey) -> float:
        """Seconds that one step of one row takes when every lane has a batch of the cap: what work is counted in."""
        cap = self.sizes(key)[-1]
        return self.step_s(key, cap) / cap / self.lanes(key)

    def row_s(self, key: BatchKey, steps: int) -> float:
        """The same of all steps of a row and its decoding."""
        return steps * self.row_step_s(key) + self.decode_s(key) / self.lanes(key)

    def decode_s(self, key: BatchKey) -> float:
        """Of one row: measured, in proportion to its latents from another shape of the model, or as long as a step."""
        known = self._curves[_cost(key)].decode_s
        if known is not None:
            return known
        for other, curve in self._curves.items():
            if other.model == key.model and curve.decode_s is not None:
                return curve.decode_s * prod(key.shape) / prod(other.shape)
        return self.step_s(key, 1)

    def text_s(self, model: str) -> float:
        return self._text.get(model, 0.0)

    def solo_s(self, key: BatchKey, steps: int) -> float:
        """Seconds of one picture alone on an idle engine, from text to pixels."""
        step_s = min(self.step_s(key, 1), self.wide_s(key, 1))
        return self.text_s(key.model) + steps * step_s + self.decode_s(key)

    def curve(self, key: BatchKey) -> dict[int, float]:
        """The measured points, for GET /v1/models: seconds by number of rows."""
        return dict(sorted(self._curves[_cost(key)].seconds.items()))

    def _row_guess(self, key: BatchKey) -> float:
        for other, curve in self._curves.items():
            if other.model == key.model and curve.seconds:
                return self.step_s(other, 1) * prod(key.shape) / prod(other.shape)
        return GUESS_S


def _eased(known: float | None, seconds: float) -> float:
    """A moving average after one more measurement."""
    return seconds if known is None else known + EASE * (seconds - known)


def _cost(key: BatchKey) -> BatchKey:
    """All LoRAs share one curve: their names come from callers, and there is no end of scales."""
    return key._replace(loras=()) if key.loras else key
