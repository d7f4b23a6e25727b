"""Two runs of the store side by side: may they be compared, sample by sample, and what is the difference?

Scores compare only when everything that decides them is equal: the suite's prompts, the metric's protocol (weights of
its judge, reference, number of samples), the size of the pictures and how clips were compressed; times only on the same
machine as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.regression import Evidence, evidence_of_costs, evidence_of_estimate, evidence_of_means
from eval.statistics import Interval, cluster_means, influence_difference, normal_interval
from eval.store import Store

Run = dict[str, Any]
Key = tuple[str, int]
COSTS = ("latency", "throughput", "memory")
"""Metrics of the machine as much as of the bundle: unpaired, compared on one machine only."""


class NotComparable(EvalError):
    """Two results were measured in different ways; the message names every difference."""


def comparability(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be equal for two results of a metric to be compared."""
    draw = {key: value for key, value in run["resolved"].get("prompts", {}).items() if key != "count"}
    identity = run["source"]["identity"] or {}
    key = {
        "world": run["world"],
        **{f"prompts.{name}": value for name, value in draw.items()},
        "seeds_per_prompt": run["resolved"].get("seeds_per_prompt"),
        "frames": run["resolved"].get("frames"),
        "codec": identity.get("codec"),
        **{f"protocol.{name}": value for name, value in result["protocol"].items()},
    }
    if result["metric"] in COSTS:
        names = ("runtime", "precision", "device", "size")
        key |= {f"hardware.{name}": value for name, value in run["hardware"].items() if name != "memory_gib"}
        key |= {name: identity.get(name) for name in names} | {"threads": run["source"]["about"].get("threads")}
    return key


def require_comparable(store: Store, a: Run, b: Run, metric: str) -> None:
    """Raises NotComparable that names what differs and both values."""
    keys = []
    for run in (a, b):
        results = store.results(run["id"])
        if metric not in results:
            raise NotComparable(f"run {run['id']} has no {metric}; score it with a suite that names the metric")
        keys.append(comparability(run, results[metric]))
    first, second = keys
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    if names:
        changes = "; ".join(f"{name} {_short(first.get(name))} against {_short(second.get(name))}" for name in names)
        raise NotComparable(f"not comparable: {changes}; score both runs again")
    texts, theirs = store.texts(a["id"]), store.texts(b["id"])
    moved = next((key for key in texts if theirs.get(key, texts[key]) != texts[key]), None)
    if moved:
        raise NotComparable(
            f"not comparable: prompt {moved[0]} is {texts[moved]!r} against {theirs[moved]!r}; score both runs again"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def evidence(store: Store, candidate: Run, baseline: Run, metric: str) -> Evidence:
    """Candidate against baseline, positive is better. Raises NotComparable."""
    require_comparable(store, candidate, baseline, metric)
    ours, theirs = (store.results(run["id"])[metric] for run in (candidate, baseline))
    left, right = (store.per_sample(run["id"], metric) for run in (candidate, baseline))
    return evidence_of(ours, theirs, left, right)


def evidence_of(
    ours: dict[str, Any], theirs: dict[str, Any], left: dict[Key, float], right: dict[Key, float]
) -> Evidence:
    """From two results of one metric and their numbers per sample."""
    better = 1 if ours["direction"] == "higher" else -1
    if ours["metric"] in COSTS:
        skip, each = (int(ours["protocol"].get(name, default)) for name, default in (("warm_up", 0), ("batch", 1)))
        once = slice(skip, None, each)  # a batch is one measurement, however many pictures carry it
        return evidence_of_costs(np.array([*left.values()][once]), np.array([*right.values()][once]), better=better)
    try:
        if ours["per_sample_kind"] == "influence":
            found = influence_difference(ours["value"], theirs["value"], left, right).interval
            return evidence_of_estimate(found.value, found.se, found.n, better=better)
    except ValueError as error:
        raise NotComparable(f"not comparable: {error}") from None
    return evidence_of_means(prompt_differences(left, right), better=better)


def retention(store: Store, candidate: Run, teacher: Run, metric: str) -> Interval | None:
    """Which share of the teacher's score is left, r = a/b, in percent; None where that means nothing.

    Only for means of which more is better. To first order r moves with the mean of (a_i − r·b_i)/b over the prompts
    that both share, so its error is that of this mean.
    """
    result, theirs = (store.results(run["id"])[metric] for run in (candidate, teacher))
    if result["direction"] != "higher" or result["per_sample_kind"] != "value" or not theirs["value"] > 0:
        return None
    left, right = (store.per_sample(run["id"], metric) for run in (candidate, teacher))
    keys = sorted(left.keys() & right.keys())
    prompts = [key[0] for key in keys]
    ours, base = (cluster_means(np.array([side[key] for key in keys]), prompts) for side in (left, right))
    if len(ours) < 2 or metric in COSTS or not base.mean() > 0:
        return None
    share = float(ours.mean() / base.mean())
    se = float((ours - share * base).std(ddof=1)) / math.sqrt(len(ours)) / float(base.mean())
    return normal_interval(100 * share, 100 * se, len(ours))


def prompt_differences(left: dict[Key, float], right: dict[Key, float]) -> NDArray[np.float64]:
    """One mean difference per prompt over the samples that both have. Raises NotComparable when there are none."""
    keys = sorted(left.keys() & right.keys())
    if not keys:
        raise NotComparable("not comparable: the two runs share no (prompt, seed) pair; score both on the same suite")
    values = np.array([left[key] - right[key] for key in keys])
    return cluster_means(values, [key[0] for key in keys])


def rolling(store: Store, runs: list[Run], metric: str) -> tuple[dict[str, Any], dict[Key, float]]:
    """The mean of several runs of one metric on one panel: a result and numbers per sample, for ``evidence_of``.

    Values and influences are linear in the runs, so their means stand for the mean night. The first run gives the rest.
    """
    results = [store.results(run["id"])[metric] for run in runs]
    vectors = [store.per_sample(run["id"], metric) for run in runs]
    shared = set(vectors[0]).intersection(*vectors[1:])
    mean = {key: float(np.mean([vector[key] for vector in vectors])) for key in vectors[0] if key in shared}
    return {**results[0], "value": float(np.mean([result["value"] for result in results]))}, mean


def movers(
    store: Store, candidate: Run, baseline: Run, metric: str, count: int = 4
) -> tuple[list[tuple[Key, float]], list[tuple[Key, float]]]:
    """The samples that got worst and best, as ((prompt id, seed), change), positive is better.

    Of a distance, the change is the difference of the influences: what the sample adds to the change of the distance,
    times n.
    """
    better = 1 if store.results(candidate["id"])[metric]["direction"] == "higher" else -1
    left, right = (store.per_sample(run["id"], metric) for run in (candidate, baseline))
    changes = sorted(((key, better * (left[key] - right[key])) for key in left if key in right), key=lambda c: c[1])
    worst = [change for change in changes[:count] if change[1] < 0]
    best = [change for change in changes[::-1][:count] if change[1] > 0]
    return worst, best
