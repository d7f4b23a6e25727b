"""Verdicts: each of the kinds, the second panel, costs, and what a night can see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.regression import (
    Evidence,
    Rule,
    Verdict,
    decide,
    evidence_of_costs,
    evidence_of_estimate,
    evidence_of_means,
    exit_code,
    minimum_detectable,
    suspects,
)

RULE = Rule.of_score(1.0)


def shifted(mean: float, spread: float = 3.0, n: int = 400, seed: int = 0) -> Evidence:
    """Differences with exactly this mean and spread."""
    normal = np.random.default_rng(seed).normal(size=n)
    return evidence_of_means(mean + spread * (normal - normal.mean()) / normal.std(ddof=1))


def test_every_verdict_has_its_case() -> None:
    cases = {
        -1.0: Verdict.REGRESSION,  # z = 6.7
        1.0: Verdict.IMPROVEMENT,
        0.0: Verdict.EQUIVALENT,  # low = −0.3
        -0.49: Verdict.EQUIVALENT,  # sure to be a drop, and smaller than half the margin: it is no news
    }
    for mean, verdict in cases.items():
        assert decide([shifted(mean)], [RULE])[0].verdict is verdict, mean
    assert decide([shifted(0.0, spread=12.0)], [RULE])[0].verdict is Verdict.INCONCLUSIVE
    assert decide([shifted(-0.9, spread=12.0)], [RULE])[0].verdict is Verdict.INCONCLUSIVE


def test_nothing_changed_is_equivalent_and_not_merely_no_difference() -> None:
    (finding,) = decide([evidence_of_means(np.zeros(50))], [RULE])
    assert finding.verdict is Verdict.EQUIVALENT and finding.evidence.worse == finding.evidence.better == 1.0
    (alone,) = decide([evidence_of_means(np.array([0.1]))], [RULE])
    assert alone.verdict is Verdict.INCONCLUSIVE and math.isnan(alone.evidence.low)


def test_a_metric_where_less_is_better_is_turned_round() -> None:
    differences = np.random.default_rng(1).normal(2.0, 1.0, 100)
    assert decide([evidence_of_means(differences, better=-1)], [RULE])[0].verdict is Verdict.REGRESSION
    assert decide([evidence_of_means(differences, better=1)], [RULE])[0].verdict is Verdict.IMPROVEMENT
    assert evidence_of_estimate(0.5, 0.1, 100, better=-1).delta == -0.5


def test_only_a_second_panel_makes_a_suspicion_a_regression() -> None:
    first = [shifted(-1.0), shifted(0.0)]
    rules = [RULE, RULE]
    assert suspects(first, rules) == [True, False]
    assert decide(first, rules, [shifted(-1.0, seed=9), None])[0].verdict is Verdict.REGRESSION
    for second in (None, shifted(0.1, seed=9), shifted(-0.4, seed=9)):
        finding = decide(first, rules, [second, None])[0]
        assert finding.suspected and finding.verdict is not Verdict.REGRESSION
    without = decide(first, rules, None)
    assert without[0].verdict is Verdict.REGRESSION and without[1].verdict is Verdict.EQUIVALENT


def test_a_suspicion_without_a_second_panel_needs_more_certainty() -> None:
    doubtful = shifted(-0.6, spread=6.0)  # z = 2, p = 0.02
    assert suspects([doubtful], [RULE]) == [True]
    assert decide([doubtful], [RULE], None)[0].verdict is Verdict.INCONCLUSIVE
    assert decide([doubtful], [RULE], [shifted(-0.9, spread=6.0, seed=3)])[0].verdict is Verdict.REGRESSION


def test_many_gates_ask_for_more() -> None:
    drop, quiet = shifted(-0.6, spread=6.0), shifted(0.0, spread=6.0)
    assert suspects([drop], [RULE]) == [True]
    assert suspects([drop, *[quiet] * 9], [RULE] * 10) == [False] * 10


def test_costs_need_percent_and_floor_and_ignore_outliers() -> None:
    rng = np.random.default_rng(2)
    base = 40 + rng.normal(size=30)
    slow, hiccup = base * 1.5, np.where(np.arange(30) < 3, 400.0, base)
    rule = Rule.of_cost(40.0, 25, 5.0)
    assert rule.threshold == 10.0 and Rule.of_cost(4.0, 25, 5.0).threshold == 5.0
    assert decide([evidence_of_costs(slow, base)], [rule])[0].verdict is Verdict.REGRESSION
    assert decide([evidence_of_costs(hiccup, base)], [rule])[0].verdict is Verdict.EQUIVALENT
    assert decide([evidence_of_costs(base * 1.1, base)], [rule])[0].verdict is Verdict.EQUIVALENT
    assert decide([evidence_of_costs(base, slow)], [rule])[0].verdict is Verdict.IMPROVEMENT
    assert evidence_of_costs(slow, base).delta == pytest.approx(-0.5 * np.median(base))


def test_the_detectable_drop_is_suspected_as_often_as_it_says() -> None:
    n, spread, gates = 200, 2.0, 8
    se = spread / math.sqrt(n)
    drop = minimum_detectable(se, Rule.of_score(0.2), gates)
    rng = np.random.default_rng(3)
    nights = 300
    hits = 0
    for _ in range(nights):
        first = evidence_of_estimate(rng.normal(-drop, se), se, n)
        others = [evidence_of_estimate(0.0, se, n)] * (gates - 1)
        hits += suspects([first, *others], [Rule.of_score(0.2)] * gates)[0]
    assert hits / nights == pytest.approx(0.80, abs=0.07)
    assert minimum_detectable(0.01, Rule.of_score(1.0), gates) == pytest.approx(0.5, abs=0.02)  # the threshold decides


@pytest.mark.parametrize(
    ("verdicts", "code", "strict"),
    [
        (["equivalent", "improvement"], 0, 0),
        (["equivalent", "regression", "broken"], 1, 1),
        (["inconclusive", "equivalent"], 0, 2),
        (["broken", "not comparable"], 3, 3),
        (["invalid"], 3, 3),
        (["not comparable", "inconclusive"], 4, 4),
        ([], 3, 3),
    ],
)
def test_exit_codes(verdicts: list[str], code: int, strict: int) -> None:
    found = [Verdict(verdict) for verdict in verdicts]
    assert (exit_code(found), exit_code(found, strict=True)) == (code, strict)
