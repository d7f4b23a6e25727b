"""Compositional accuracy: is what the caption says in the picture, and nothing else?

A labeller, trained on exact labels, lists the things that it sees. A picture is right when there are as many as the
caption names, each with the stated shape, colour, size and material, and every stated relation holds. What a caption
leaves open is not judged. ``compare`` is the whole definition and needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.data.captions import ATTRIBUTES, Caption
from eval import judges
from eval.errors import EvalError
from eval.geneval import by_task
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import Interval, bootstrap_mean, wilson

_MOST = 8
"""A picture with more things is wrong anyway; the surest ones are enough for its rates and bound the search."""
_AXES = {"left": ("x", -1), "right": ("x", 1), "front": ("z", -1), "behind": ("z", 1)}


class Detected(Protocol):
    """A thing that a labeller saw; x points right, z away from the camera; score is the confidence."""

    @property
    def shape(self) -> str: ...

    @property
    def colour(self) -> str: ...

    @property
    def size(self) -> str: ...

    @property
    def material(self) -> str: ...

    @property
    def x(self) -> float: ...

    @property
    def z(self) -> float: ...

    @property
    def score(self) -> float: ...


class Labeller(Protocol):
    def detect(self, images: Any) -> Sequence[Sequence[Detected]]:
        """Things in pictures (B, 3, H, W) uint8."""


@dataclass(frozen=True)
class Verdict:
    """How one picture answers its caption. rates: shares of stated facts that hold, None where none is stated."""

    right: bool
    count: bool
    rates: dict[str, float | None]


def compare(detections: Sequence[Detected], facts: Caption) -> bool:
    """Whether the detections are exactly the caption's things, with all that is stated of them and between them."""
    return judge(detections, facts).right


def judge(detections: Sequence[Detected], facts: Caption) -> Verdict:
    """Match detections to the caption's things so that most stated facts hold, and say which do.

    With a wrong number of things, what is there is matched as far as it goes and facts of missing things fail.
    """
    surest = sorted(detections, key=lambda thing: -thing.score)[:_MOST]
    best: list[tuple[str, bool]] = []
    best_hits = -1
    slots: list[Detected | None] = [*surest, *[None] * max(0, len(facts.things) - len(surest))]
    for chosen in permutations(slots, len(facts.things)):
        checks = _checks(chosen, facts)
        hits = sum(ok for _, ok in checks)
        if hits > best_hits:
            best, best_hits = checks, hits
    count = len(detections) == len(facts.things)
    rates = {kind: _share([ok for name, ok in best if name == kind]) for kind in (*ATTRIBUTES, "relation")}
    return Verdict(count and all(ok for _, ok in best), count, rates)


def _checks(chosen: Sequence[Detected | None], facts: Caption) -> list[tuple[str, bool]]:
    """Every stated fact by kind, and whether it holds when thing i of the caption is chosen[i]."""
    found = {described.index: detected for described, detected in zip(facts.things, chosen, strict=True)}
    checks = [
        (name, (thing := found[described.index]) is not None and getattr(thing, name) == stated)
        for described in facts.things
        for name, stated in described.stated
    ]
    for i, name, j in facts.relations:
        axis, sign = _AXES[name]
        a, b = found[i], found[j]
        holds = a is not None and b is not None and (getattr(a, axis) - getattr(b, axis)) * sign > 0
        checks.append(("relation", holds))
    return checks


def task(facts: Caption) -> str:
    """Which of GenEval's tasks a caption is, by the last of these that applies.

    One thing: colors, as captions of scenes state every colour; several of one kind: counting; of several kinds:
    color_attr; a relation between them: position. single_object and two_object name no colour and do not occur.
    """
    if facts.relations:
        return "position"
    kinds = {tuple(thing.stated) for thing in facts.things}
    if len(kinds) > 1:
        return "color_attr"
    return "counting" if len(facts.things) > 1 else "colors"


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


@register
class Composition(PerSampleMetric):
    """Share of pictures that show exactly what their caption says."""

    name = "composition"
    direction = "higher"
    unit = "%"
    smallest_n = 200

    def __init__(self, folder: Path | None = None, labeller: Labeller | None = None, identity: str = "") -> None:
        super().__init__()
        self._labeller, self._identity = (labeller, identity) if labeller else load_labeller(folder)
        self._counts: list[bool] = []
        self._rates: list[dict[str, float | None]] = []
        self._tasks: list[str] = []

    def update(self, samples: Samples) -> None:
        import torch

        detections = self._labeller.detect(torch.from_numpy(samples.images))
        if len(detections) != len(samples.prompts):
            raise EvalError(f"the labeller answered for {len(detections)} of {len(samples.prompts)} pictures")
        verdicts = []
        for seen, prompt in zip(detections, samples.prompts, strict=True):
            if prompt.caption is None:
                raise EvalError(f"prompt {prompt.id!r} has no facts to compare with; use a suite of world scenes")
            verdicts.append(judge(seen, prompt.caption))
            self._tasks.append(task(prompt.caption))
        self._counts += [verdict.count for verdict in verdicts]
        self._rates += [verdict.rates for verdict in verdicts]
        self._add(np.array([100.0 * verdict.right for verdict in verdicts]), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        parts = {"count": float(np.mean(self._counts))}
        for kind in (*ATTRIBUTES, "relation"):
            stated = [rate for rates in self._rates if (rate := rates[kind]) is not None]
            if stated:
                parts[kind] = float(np.mean(stated))
        right = [value > 0 for value in self._values]
        parts |= {f"task {name}": share for name, share in by_task(right, self._tasks).items()}
        protocol = {"labeller": self._identity, "rule": "exact things, stated relations"}
        return self._score(proportion(values, self._clusters), values, protocol, parts=parts).check()


def proportion(percent: np.ndarray[Any, np.dtype[np.float64]], clusters: Sequence[str]) -> Interval:
    """Wilson's interval in percent; with several seeds per prompt, for as many trials as the clustering leaves.

    percent: (n,) of 0 or 100. The effective number of trials is p(1 − p)/se² with the clustered standard error, and
    never more than n or less than the number of prompts.
    """
    n, groups = len(percent), len(set(clusters))
    share = float(percent.mean()) / 100
    trials = n
    if groups < n:
        se = bootstrap_mean(percent, clusters).se / 100
        trials = groups if not se > 0 else min(n, max(groups, round(share * (1 - share) / se**2)))
    plain = wilson(share * trials, trials)
    return Interval(100 * plain.value, 100 * plain.low, 100 * plain.high, 100 * plain.se, groups)


def load_labeller(folder: Path | None) -> tuple[Labeller, str]:
    """The trained labeller of scenes and the digest of its files."""
    path = judges.find(folder, "scenes-labeller")
    from distill.labeller import Labeller as Trained

    return Trained.load(path), judges.digest(path)
