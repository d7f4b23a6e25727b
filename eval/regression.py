"""Did it get worse? Evidence about one measure, and verdicts over all of them. numpy alone, no store.

A night asks many questions at once, so a single small p-value proves nothing. A measure is *suspected* when its drop
passes a threshold and, by Holm over all gates, would be luck in one night of ten; a suspicion counts only when fresh
prompts and seeds, for both models, show it again. What does not alarm is called equivalent only when the interval
excludes a drop by the margin; otherwise it is inconclusive, with the drop that would have been seen.

    suspicions = suspects(evidence, rules)
    findings = decide(evidence, rules, confirmations)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from eval.statistics import LEVEL, Interval, bootstrap_mean, holm, normal_interval, rank_sum_p, sign_flip_p

Array = NDArray[np.float64]
SCREEN = 0.10
"""Family-wise level of a suspicion; it costs a second panel, not somebody's sleep."""
CONFIRM = 0.01
"""Level of the confirmation on the fresh panel, and family-wise level where there is none."""
IMPROVE = 0.05
"""Family-wise level at which an improvement is claimed."""
POWER = 0.80
"""With which probability a drop of the printed minimum detectable effect is suspected."""


class Verdict(StrEnum):
    REGRESSION = "regression"
    IMPROVEMENT = "improvement"
    EQUIVALENT = "equivalent"
    INCONCLUSIVE = "inconclusive"
    NOT_COMPARABLE = "not comparable"
    INVALID = "invalid"
    """The metric missed a planted damage tonight, so its silence means nothing."""
    BROKEN = "broken"
    """There is no measurement: generation or scoring failed."""


@dataclass(frozen=True)
class Evidence:
    """Candidate minus baseline, turned so that positive is better, in the measure's unit.

    low, high: 95 % interval. worse, better: one-sided p-values of no drop and of no gain. n: prompts.
    """

    delta: float
    low: float
    high: float
    se: float
    worse: float
    better: float
    n: int


def evidence_of_means(
    differences: Array, *, better: int = 1, interval: Callable[[Array], Interval] = bootstrap_mean
) -> Evidence:
    """From one difference (candidate − baseline) per prompt. better: −1 where less is better.

    p-values are those of flipping signs, which assume only that differences are symmetric when nothing changed.
    """
    turned = better * np.asarray(differences, dtype=np.float64)
    found = interval(turned)
    return Evidence(
        found.value,
        found.low,
        found.high,
        found.se,
        sign_flip_p(turned, "below"),
        sign_flip_p(turned, "above"),
        found.n,
    )


def evidence_of_estimate(delta: float, se: float, n: int, *, better: int = 1) -> Evidence:
    """From a difference with its standard error, normal: Fréchet and kernel distances by their influences."""
    found = normal_interval(better * delta, se, n)
    if se > 0:
        below = NormalDist().cdf(found.value / se)
        return Evidence(found.value, found.low, found.high, se, below, 1 - below, n)
    worse, gain = float(found.value >= 0), float(found.value <= 0)
    return Evidence(found.value, found.low, found.high, se, worse, gain, n)


def evidence_of_costs(candidate: Array, baseline: Array, *, better: int = -1) -> Evidence:
    """From two unpaired samples of a cost, or of a speed (better: 1): difference of medians, Mann and Whitney's p.

    The standard error of a median is √(π/2)·σ/√n with σ from the quartiles, so that a few outliers do not widen it.
    """
    candidate, baseline = -better * candidate, -better * baseline
    delta = float(np.median(baseline) - np.median(candidate))
    se = math.hypot(_median_se(candidate), _median_se(baseline))
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * se
    worse, gain = rank_sum_p(candidate, baseline), rank_sum_p(baseline, candidate)
    return Evidence(delta, delta - half, delta + half, se, worse, gain, min(len(candidate), len(baseline)))


def _median_se(values: Array) -> float:
    low, high = np.quantile(values, (0.25, 0.75))
    return math.sqrt(math.pi / 2 / len(values)) * float(high - low) / 1.349


@dataclass(frozen=True)
class Rule:
    """What matters of a measure, in its unit. margin: the largest drop that is none. threshold: the least that alarms.

    For scores half the margin alarms when it is sure; a cost alarms beyond its whole margin, because clocks wander.
    """

    margin: float
    threshold: float

    @classmethod
    def of_score(cls, margin: float) -> Rule:
        return cls(margin, margin / 2)

    @classmethod
    def of_cost(cls, baseline: float, percent: float, floor: float) -> Rule:
        margin = max(abs(baseline) * percent / 100, floor)
        return cls(margin, margin)


@dataclass(frozen=True)
class Finding:
    """A verdict and why. adjusted: p of no drop after Holm. mde: the drop suspected with probability POWER."""

    verdict: Verdict
    evidence: Evidence
    rule: Rule
    adjusted: float
    mde: float
    suspected: bool
    confirmation: Evidence | None = None


def suspects(evidence: Sequence[Evidence], rules: Sequence[Rule], level: float = SCREEN) -> list[bool]:
    """Which measures need a second look: sure enough after Holm, and a drop of at least the threshold."""
    adjusted = holm([found.worse for found in evidence])
    return [p < level and _drops(found, rule) for p, found, rule in zip(adjusted, evidence, rules, strict=True)]


def _drops(evidence: Evidence, rule: Rule) -> bool:
    return evidence.delta <= -rule.threshold


def decide(
    evidence: Sequence[Evidence], rules: Sequence[Rule], confirmations: Sequence[Evidence | None] | None = None
) -> list[Finding]:
    """One finding per measure. confirmations: of the suspected ones, from the fresh panel, in the same order.

    None for confirmations means that there is no second panel: then a regression needs Holm at the level CONFIRM. None
    for a single suspected measure (its panel could not be made) leaves it inconclusive.
    """
    worse, better = holm([e.worse for e in evidence]), holm([e.better for e in evidence])
    suspicions = suspects(evidence, rules)
    findings = []
    for i, (found, rule) in enumerate(zip(evidence, rules, strict=True)):
        second = confirmations[i] if confirmations is not None else None
        if not suspicions[i]:
            confirmed = False
        elif confirmations is None:
            confirmed = worse[i] < CONFIRM
        else:
            confirmed = second is not None and second.worse < CONFIRM and _drops(second, rule)
        verdict = _verdict(found, rule, confirmed, better[i])
        mde = minimum_detectable(found.se, rule, len(evidence))
        findings.append(Finding(verdict, found, rule, worse[i], mde, suspicions[i], second))
    return findings


def _verdict(evidence: Evidence, rule: Rule, confirmed: bool, better: float) -> Verdict:
    if confirmed:
        return Verdict.REGRESSION
    if better < IMPROVE and evidence.delta >= rule.threshold:
        return Verdict.IMPROVEMENT
    return Verdict.EQUIVALENT if evidence.low > -rule.margin else Verdict.INCONCLUSIVE


def minimum_detectable(se: float, rule: Rule, gates: int) -> float:
    """The true drop that is suspected with probability POWER: enough for significance and for the threshold.

    (z_{1 − SCREEN/gates} + z_POWER)·se, with the smallest of Holm's levels, or threshold + z_POWER·se if that is more.
    """
    normal = NormalDist()
    z = normal.inv_cdf(POWER)
    return max((normal.inv_cdf(1 - SCREEN / gates) + z) * se, rule.threshold + z * se)


def exit_code(verdicts: Iterable[Verdict], *, strict: bool = False) -> int:
    """0 pass, 1 regression, 2 inconclusive (only when strict), 3 broken or invalid, 4 not comparable.

    A confirmed regression outranks whatever else is unknown.
    """
    seen = set(verdicts)
    if Verdict.REGRESSION in seen:
        return 1
    if not seen or seen & {Verdict.BROKEN, Verdict.INVALID}:
        return 3
    if Verdict.NOT_COMPARABLE in seen:
        return 4
    return 2 if strict and Verdict.INCONCLUSIVE in seen else 0
