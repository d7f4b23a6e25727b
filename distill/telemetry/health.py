"""Is a run healthy? Rules with thresholds and reasons, read from its log alone.

The thresholds are ours: no paper gives any. They were set so that runs of our recipes pass, and runs that were made to
collapse, to hack their reward or to diverge do not (docs/method.md shows these, and what the rules miss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from distill.telemetry.record import Record, Series

Level = Literal["healthy", "watch", "bad", "unknown"]
ORDER: tuple[Level, ...] = ("unknown", "healthy", "watch", "bad")
LATE = 3
"""The last points whose median is judged."""


@dataclass(frozen=True)
class Rule:
    """A series, the two thresholds that it should not pass, and what it means when it does.

    rising: large values are bad, else small ones. disease: what the headline calls it. missing: what to do for a
    judgement where there is no series.
    """

    title: str
    disease: str
    series: Callable[[Record], Series]
    watch: float
    bad: float
    reason: str
    remedy: str
    missing: str
    rising: bool = True
    unit: str = ""

    def level(self, value: float) -> Level:
        sign = 1 if self.rising else -1
        if not math.isfinite(value) or sign * value > sign * self.bad:
            return "bad"
        return "watch" if sign * value > sign * self.watch else "healthy"


@dataclass(frozen=True)
class Finding:
    """What a rule says of a run. value: the median of the last points; since: from where on it was never healthy."""

    rule: Rule
    level: Level
    value: float | None = None
    since: int | None = None


@dataclass(frozen=True)
class Verdict:
    level: Level
    headline: str
    findings: list[Finding]


def judge(record: Record) -> Verdict:
    """All rules on one run; the worst finding is the verdict."""
    findings = [examine(rule, record) for rule in RULES]
    findings.sort(key=lambda finding: -ORDER.index(finding.level))
    level = findings[0].level
    if level in ("healthy", "unknown"):
        judged = sum(finding.level == "healthy" for finding in findings)
        if 2 * judged < len(findings):
            told = f"Not judged: no rule objects, but only {judged} of {len(findings)} could be applied"
            return Verdict("unknown", told, findings)
        return Verdict("healthy", f"Healthy: no rule objects, of {judged} that could be applied", findings)
    worst = [finding for finding in findings if finding.level == level]
    diseases = list(dict.fromkeys(finding.rule.disease for finding in worst))
    since = min((f.since for f in worst if f.since is not None), default=None)
    word = "Unhealthy" if level == "bad" else "Watch it"
    return Verdict(level, f"{word}: {_and(diseases)}" + (f", from iteration {since} on" if since else ""), findings)


def examine(rule: Rule, record: Record) -> Finding:
    series = rule.series(record)
    if not len(series):
        return Finding(rule, "unknown")
    value = median(series.y[-LATE:])
    level = rule.level(value)
    if level == "healthy":
        return Finding(rule, level, value)
    since = series.x[-1]
    for x, y in zip(reversed(series.x), reversed(series.y), strict=True):
        if rule.level(y) == "healthy":
            break
        since = x
    return Finding(rule, level, value, since)


def growth(series: Series) -> Series:
    """Each value over the median of the first fifth (at least three points)."""
    if len(series) < LATE:
        return Series((), ())
    first = median(series.y[: max(LATE, len(series) // 5)])
    return Series(series.x, tuple(y / first if first > 0 else math.inf for y in series.y))


def worst_of(several: Sequence[Series]) -> Series:
    """The largest value at each iteration that any of them has."""
    at: dict[int, float] = {}
    for series in several:
        for x, y in zip(series.x, series.y, strict=True):
            at[x] = max(y, at.get(x, -math.inf))
    return Series(tuple(sorted(at)), tuple(at[x] for x in sorted(at)))


def gradients(record: Record) -> Series:
    """The gradient norm over its clip, of the role where this is largest."""
    found = []
    for name in (n for n in record.names("") if n.endswith("/grad_norm")):
        role = record.recipe.get(name.removesuffix("/grad_norm")) or record.recipe.get("optimizer") or {}
        clip = float(role.get("clip", math.inf))
        series = record.series(name)
        if math.isfinite(clip):
            found.append(Series(series.x, tuple(y / clip for y in series.y)))
    return worst_of(found)


def faults(record: Record) -> Series:
    """Values that were not finite, and rewards (held-out ones as well) that were not, summed up to each interval."""
    x, y, total = [], [], 0.0
    for line in record.lines:
        total += sum(line.get("not_finite", {}).values()) + (line.get("reward_not_finite") or 0.0)
        x.append(int(line["iteration"]))
        y.append(total)
    return Series(tuple(x), tuple(y))


def ahead(record: Record) -> Series:
    """Share of lost samples wherever the probe's mean reward leads the teacher's own by a deviation, else 0."""
    lead, lost = record.series("probe/reward_lead"), record.series("zone/lost")
    if lead.x != lost.x:
        return Series((), ())
    return Series(lost.x, tuple(share if by > 1 else 0.0 for by, share in zip(lead.y, lost.y, strict=True)))


def named(name: str) -> Callable[[Record], Series]:
    return lambda record: record.series(name)


PROBES = "Probes are off: set telemetry.every in the recipe."
RULES: tuple[Rule, ...] = (
    Rule(
        "Numbers are finite", "numbers that are not finite", faults, 0, 10,
        "A reward that is not finite counts as advantage 0; any other number that is not finite ends a run soon.",
        "Look for empty or saturated pictures in the previews, and lower the learning rates.", "", unit="values",
    ),
    Rule(
        "The training reward has no lead over held-out ones", "reward hacking", named("reward_gap"), 0.5, 1.5,
        "Progress of the training reward since the start, minus that of the held-out rewards, in standard deviations "
        "between samples. A student that only gets better for its own judge has found the judge's blind spot.",
        "Lower adaptation.strength or the weight of the reward's gradient, or let safeguards.reward_gap do so.",
        "Without held-out rewards nobody can tell progress from hacking: name heldout_rewards.", unit="σ",
    ),
    Rule(
        "What the reward likes, the teacher knows", "reward hacking", ahead, 0.3, 0.5,
        "Share of lost samples while the mean reward is more than a standard deviation above that of the teacher's own "
        "samples, else 0. Such a reward is earned by pictures that the teacher cannot denoise.",
        "Turn on safeguards.two_key, which lets a reward act only where the teacher agrees.",
        "Needs probes and a reward.",
    ),
    Rule(
        "Samples of a prompt differ", "collapse", named("probe/diversity"), 0.7, 0.5,
        "Root mean square distance between the samples of a prompt, over that of the teacher's own samples.",
        "Turn on safeguards.diversity or first_step_anchor; lower guidance, and s.", PROBES, rising=False,
    ),
    Rule(
        "Samples stay out of the forbidden zone", "samples in the forbidden zone", named("zone/share"), 0.1, 0.3,
        "Share of samples that the teacher does not know and that the fake score no longer pushes.",
        "Use sharpening (repulsion where the reward is low), a smaller learning rate of the student, or a GAN on real "
        "data, which is the one force that does not come from the teacher.", PROBES,
    ),
    Rule(
        "The teacher knows the samples", "samples that the teacher does not know", named("zone/lost"), 0.3, 0.6,
        "Share of samples whose denoising residual under the teacher lies above 95 % of its own samples'; a perfect "
        "student has 5 %.",
        "The student moves faster than the fake score learns, or guidance is too strong: lower student.learning_rate "
        "or guidance, raise fake.learning_rate or fake_per_student.", PROBES,
    ),
    Rule(
        "The fake score keeps up", "a fake score that lags", named("probe/fake_residual"), 1.5, 2.5,
        "The fake score's residual on the student's samples over the teacher's. Above 1 it knows the student less "
        "well than the teacher does, and matching pulls in a wrong direction.",
        "Raise fake_per_student or fake.learning_rate.", PROBES,
    ),
    Rule(
        "The fake score's error is bounded", "a diverging fake score", lambda r: growth(r.series("fake_error")), 3, 10,
        "Growth since the first fifth of the run. It rises a little as samples become sharper; it explodes where "
        "samples run away.",
        "Lower student.learning_rate and guidance; raise fake_per_student.", "Needs three intervals.", unit="×",
    ),
    Rule(
        "Gradients stay below their clip", "exploding gradients", gradients, 1, 5,
        "The mean gradient norm over the role's clip, of the role where it is largest. Beyond 1 every step is cut to "
        "one length and the size of the loss has no meaning.",
        "Lower the learning rate; where only the scale is off, raise clip.", "The recipe names no clip.", unit="×",
    ),
    Rule(
        "W leaves enough samples", "a fake score that learns from few samples", named("w_ess"), 0.5, 0.25,
        "Effective sample size of the fake loss's weights as a share of the batch. With advantages clipped "
        "at ±1 it cannot fall below 0.42 within a group.",
        "Keep sharpening.clipped, or raise advantage.sigma_floor.", "Only distillation weighs its samples.",
        rising=False,
    ),
    Rule(
        "Advantages are graded", "bang-bang weights", named("advantage_clipped"), 0.7, 0.95,
        "Share of advantages at their bound or beyond. Near 1 every sample counts as either best or worst.",
        "Raise advantage.sigma_floor to the reward's own spread, or use squash: tanh.", "Needs an advantage.",
    ),
)  # fmt: skip


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
