"""Scores of a bundle at every number of steps that it offers: more steps should not make worse pictures.

The curve of a teacher rises and levels off. Of a distilled student it may turn, as what was trained for one number of
steps drifts when it takes another. A turn that is sure is reported; it wakes nobody, as users choose their steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from eval.gates import Gates
from eval.pairing import evidence
from eval.regression import CONFIRM
from eval.sources import BundleSource
from eval.store import Store

Run = dict[str, Any]
At = Callable[[int], Run]
"""at(steps) -> the complete run of the canaries' suite with that many steps."""


def step_curve(store: Store, source: BundleSource, gates: Gates, at: At) -> tuple[list[dict[str, Any]], list[str]]:
    """Points {metric, direction, unit, steps, value, low, high} of every metric that has a canary, and turns.

    A turn is a metric that is worse with more steps, by a tenth of the least that a canary must do to it and at one
    percent.
    """
    if gates.canaries is None or len(source.manifest.samplers) < 2:
        return [], []
    least = {
        metric: min(c.at_least for c in gates.canaries.expect if c.metric == metric)
        for metric in dict.fromkeys(canary.metric for canary in gates.canaries.expect)
    }
    runs = {steps: at(steps) for steps in sorted(source.manifest.samplers)}
    points, turns = [], []
    for metric, at_least in least.items():
        for steps, run in runs.items():
            result = store.results(run["id"])[metric]
            names = ("direction", "unit", "value", "low", "high")
            points.append({"metric": metric, "steps": steps} | {name: result[name] for name in names})
        for fewer, more in itertools.pairwise(runs):
            found = evidence(store, runs[more], runs[fewer], metric)
            if found.worse < CONFIRM and found.delta <= -at_least / 10:
                turns.append(f"{more} steps are worse than {fewer} in {metric}, by {-found.delta:.3g}")
    return points, turns
