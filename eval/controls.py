"""Controls of a night: the same thing measured twice, and canaries that every metric must see.

A/A: the canary panel is made again without the cache and scored again; what differs is the noise of the whole chain.
Canaries: damaged copies of the bundle must score worse by at least the stated amount, at one percent. A metric that
misses its canary, or tells a bundle from itself, says nothing tonight: it is invalid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.damage import damaged
from eval.gates import Gates
from eval.pairing import evidence
from eval.regression import CONFIRM
from eval.sources import Source
from eval.store import Store

Run = dict[str, Any]
Scorer = Callable[[Source, str, int | None, str, bool], Run]
"""score(source, suite, samples, label, cached) -> the complete run."""


@dataclass(frozen=True)
class Control:
    """One check: what was done, the metric, the change (positive is worse) beside what was expected, and the verdict.

    expected is 0 for A/A, where the change must not be sure and larger than a tenth of what the canaries expect.
    """

    damage: str
    metric: str
    expected: float
    change: float
    p: float
    ok: bool


def run_controls(store: Store, source: Source, gates: Gates, score: Scorer, folder: Path) -> list[Control]:
    """All controls of a bundle's gates. folder: where damaged copies of the bundle are written."""
    canaries = gates.canaries
    if canaries is None:
        return []
    plain = score(source, canaries.suite, canaries.samples, "control", True)
    again = score(source, canaries.suite, canaries.samples, "A/A", False)
    least = {metric: min(c.at_least for c in canaries.expect if c.metric == metric) for metric in _metrics(gates)}
    found = [_same(store, again, plain, metric, at_least / 10) for metric, at_least in least.items()]
    for damage in dict.fromkeys(canary.damage for canary in canaries.expect):
        run = score(damaged(source, damage, folder), canaries.suite, canaries.samples, damage, True)
        for canary in (c for c in canaries.expect if c.damage == damage):
            seen = evidence(store, run, plain, canary.metric)
            ok = seen.delta <= -canary.at_least and seen.worse < CONFIRM
            found.append(Control(damage, canary.metric, canary.at_least, -seen.delta, seen.worse, ok))
    return found


def _metrics(gates: Gates) -> list[str]:
    assert gates.canaries is not None
    return list(dict.fromkeys(canary.metric for canary in gates.canaries.expect))


def _same(store: Store, again: Run, plain: Run, metric: str, most: float) -> Control:
    found = evidence(store, again, plain, metric)
    p = min(1.0, 2 * min(found.worse, found.better))
    return Control("A/A", metric, 0.0, -found.delta, p, abs(found.delta) <= most or p >= CONFIRM)


def invalid_metrics(controls: list[Control]) -> dict[str, str]:
    """Why each metric that failed a control cannot be believed tonight."""
    reasons: dict[str, str] = {}
    for control in controls:
        if control.ok or control.metric in reasons:
            continue
        if control.damage == "A/A":
            why = f"it tells the bundle from itself: changed by {control.change:.3g} when measured twice"
        else:
            why = f"it missed its canary: {control.damage} made it worse by {control.change:.3g}"
            why += f", expected {control.expected:.3g} at least (p {control.p:.2g})"
        reasons[control.metric] = why
    return reasons
