"""Each rule objects to the run that it is meant for, and to no healthy one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from distill.telemetry.health import RULES, examine, growth, judge, worst_of
from distill.telemetry.record import Record, Series

CLIPS = {"student": {"clip": 10.0}, "fake": {"clip": 10.0}}
HEALTHY: dict[str, float] = {
    "zone/share": 0.0, "zone/lost": 0.1, "probe/diversity": 1.1, "probe/fake_residual": 1.0, "probe/reward_lead": 0.2,
    "reward_gap": 0.1, "fake_error": 0.3, "student/grad_norm": 0.8, "fake/grad_norm": 1.2, "w_ess": 0.66,
    "advantage_clipped": 0.4, "reward_not_finite": 0.0,
}  # fmt: skip


def run(intervals: int = 20, *, names: Any = HEALTHY, **changes: Callable[[int], float]) -> Record:
    """A log whose numbers are healthy but for some that are functions of the interval, named with _ for /."""
    lines = []
    for i in range(intervals):
        line: dict[str, Any] = {"iteration": 10 * (i + 1)} | {name: HEALTHY[name] for name in names}
        line |= {name: f(i) for key, f in changes.items() if (name := SPELLED.get(key, key))}
        lines.append({k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in line.items()})
    return Record("run", CLIPS, lines)


SPELLED = {name.replace("/", "_"): name for name in HEALTHY}


def test_a_healthy_run_passes_every_rule() -> None:
    verdict = judge(run())
    assert verdict.level == "healthy" and {f.level for f in verdict.findings} == {"healthy"}
    assert verdict.headline == f"Healthy: no rule objects, of {len(RULES)} that could be applied"


@pytest.mark.parametrize(
    ("changes", "disease"),
    [
        ({"probe_diversity": lambda i: 1.0 - 0.04 * i}, "collapse"),
        ({"reward_gap": lambda i: 0.12 * i}, "reward hacking"),
        ({"zone_lost": lambda i: 0.55, "probe_reward_lead": lambda i: 3.0}, "reward hacking"),
        ({"zone_lost": lambda i: 0.05 * i}, "samples that the teacher does not know"),
        ({"zone_share": lambda i: 0.03 * i}, "samples in the forbidden zone"),
        ({"fake_error": lambda i: 0.2 * 1.5**i}, "a diverging fake score"),
        ({"probe_fake_residual": lambda i: 1 + 0.2 * i}, "a fake score that lags"),
        ({"fake_grad_norm": lambda i: 4.0 * i}, "exploding gradients"),
        ({"w_ess": lambda i: 1 - 0.05 * i}, "a fake score that learns from few samples"),
        ({"advantage_clipped": lambda i: 0.97}, "bang-bang weights"),
        ({"reward_not_finite": lambda i: 2.0}, "numbers that are not finite"),
    ],
)
def test_each_disease_is_named(changes: dict[str, Callable[[int], float]], disease: str) -> None:
    verdict = judge(run(**changes))
    assert verdict.level == "bad" and disease in verdict.headline
    assert [f.rule.disease for f in verdict.findings if f.level == "bad"] == [disease]


def test_every_rule_has_a_disease_in_these_tests_and_words_for_a_reader() -> None:
    for rule in RULES:
        assert (rule.watch < rule.bad) == rule.rising
        assert rule.reason.endswith(".") and rule.remedy.endswith(".")


def test_a_finding_says_from_when_on() -> None:
    """From where on it was never healthy again, not from the first time that it was not."""
    (finding,) = [
        f for f in judge(run(probe_diversity=lambda i: 0.4 if i == 3 or i >= 12 else 1.0)).findings if f.since
    ]
    assert finding.level == "bad" and finding.since == 130
    watched = judge(run(reward_gap=lambda i: 1.0 if i >= 15 else 0.0))
    assert watched.level == "watch" and watched.headline == "Watch it: reward hacking, from iteration 160 on"


def test_one_bad_point_is_not_a_finding() -> None:
    assert judge(run(probe_diversity=lambda i: 0.1 if i == 18 else 1.0)).level == "healthy"


def test_missing_telemetry_is_not_health() -> None:
    """A run without probes and held-out rewards is not called healthy; each rule says what would be needed."""
    verdict = judge(run(names=["fake_error", "student/grad_norm"]))
    assert verdict.level == "unknown" and verdict.headline.startswith("Not judged: no rule objects, but only 3 of")
    unjudged = [f for f in verdict.findings if f.level == "unknown"]
    assert len(unjudged) == len(RULES) - 3 and all(f.rule.missing for f in unjudged)


def test_a_lead_alone_or_lost_samples_alone_are_no_hacking() -> None:
    rule = next(r for r in RULES if r.title.startswith("What the reward likes"))
    assert examine(rule, run(probe_reward_lead=lambda i: 3.0)).level == "healthy"
    assert examine(rule, run(zone_lost=lambda i: 0.55)).level == "healthy"
    assert examine(rule, run(names=["zone/lost"])).level == "unknown"


def test_lines_with_faults_are_summed_up() -> None:
    record = run()
    record.lines[4]["not_finite"] = {"heldout/judge": 3}
    (finding,) = [f for f in judge(record).findings if f.level != "healthy"]
    assert (finding.level, finding.value, finding.since) == ("watch", 3.0, 50)


def test_growth_is_over_the_median_of_the_first_fifth() -> None:
    series = Series(tuple(range(20)), (9.0, 1.0, 1.0, 1.0, *[4.0] * 16))
    assert growth(series).y[-1] == 4.0 and len(growth(Series((1, 2), (1.0, 1.0)))) == 0


def test_the_worst_of_several_series_is_taken_where_any_has_a_point() -> None:
    assert worst_of([Series((1, 2), (1.0, 5.0)), Series((2, 3), (4.0, 2.0))]) == Series((1, 2, 3), (1.0, 5.0, 2.0))
