"""How often would the nightly gates cry wolf, and how small a drop would they find? A simulation of statistics alone.

    python -m eval.power                              # the gates of all embedded bundles, 1,000 nights
    python -m eval.power --gates scenes-sdxl --nights 5000 --shift 0.1 0.15

Every night draws one paired difference per prompt and gate, judges them with the code that judges real nights, and
draws a fresh panel where that code asks for one. Gates of one suite share prompts, so their differences are correlated.
Shifts are in standard deviations of a prompt's paired difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.regression import Evidence, Rule, Verdict, decide, evidence_of_estimate, evidence_of_means, suspects
from eval.statistics import Interval, normal_interval, wilson

Array = NDArray[np.float64]
CORRELATION = 0.7
MARGIN = 0.10
"""In standard deviations; the margins in eval/gates are 0.02 to 0.1 of those between two students of one teacher."""
DISCORDANT = 0.10
"""Share of prompts of a binary score whose answer changes between two nights."""


Kind = Literal["mean", "binary", "distance"]
_KINDS: dict[str, Kind] = {
    "composition": "binary",
    "digit-accuracy": "binary",
    "fid": "distance",
    "fvd": "distance",
    "kid": "distance",
    "kvd": "distance",
    "motion-accuracy": "binary",
}


@dataclass(frozen=True)
class Group:
    """Gates that share their prompts: means of any numbers, of right and wrong, or distances with a standard error."""

    prompts: int
    gates: int
    kind: Kind = "mean"


@dataclass(frozen=True)
class Outcome:
    """Of simulated nights: how many alarmed, named the shifted gate or another one, and asked for a second panel."""

    nights: int
    alarms: int
    named: int
    misnamed: int
    suspicions: int


def simulate(groups: Sequence[Group], *, nights: int = 1000, shift: float = 0.0, seed: int = 0) -> Outcome:
    """Nights on which the first gate's true difference is −shift standard deviations, and no other one's is not 0."""
    rng = np.random.default_rng((seed, round(1e6 * shift)))
    rules = [Rule.of_score(MARGIN) for group in groups for _ in range(group.gates)]
    alarms = named = misnamed = suspicions = 0
    for _ in range(nights):
        first = _panel(groups, shift, rng)
        doubted = suspects(first, rules)
        suspicions += any(doubted)
        second: list[Evidence | None] = list(_panel(groups, shift, rng)) if any(doubted) else [None] * len(first)
        red = [finding.verdict is Verdict.REGRESSION for finding in decide(first, rules, second)]
        alarms += any(red)
        named += red[0]
        misnamed += any(red[1:])
    return Outcome(nights, alarms, named, misnamed, suspicions)


def _panel(groups: Sequence[Group], shift: float, rng: np.random.Generator) -> list[Evidence]:
    found = []
    for index, group in enumerate(groups):
        n = 1 if group.kind == "distance" else group.prompts
        normal = CORRELATION**0.5 * rng.standard_normal(n)
        normal = normal + (1 - CORRELATION) ** 0.5 * rng.standard_normal((group.gates, n))
        for gate, row in enumerate(normal):
            drop = shift if (index, gate) == (0, 0) else 0.0
            if group.kind == "distance":  # what is averaged, hence normal, are influences
                se = group.prompts**-0.5
                found.append(evidence_of_estimate(float(row[0]) * se - drop, se, group.prompts))
            else:
                values = _binary(row, drop) if group.kind == "binary" else row - drop
                found.append(evidence_of_means(values, interval=_normal))
    return found


def _binary(normal: Array, drop: float) -> Array:
    """Differences −1, 0, +1 in units of their standard deviation, with mean −drop, from standard normal numbers."""
    sd = DISCORDANT**0.5
    up, down = (DISCORDANT - drop * sd) / 2, (DISCORDANT + drop * sd) / 2
    high, low = NormalDist().inv_cdf(1 - up), NormalDist().inv_cdf(down)
    return np.asarray(((normal > high).astype(np.float64) - (normal < low)) / sd)


def _normal(values: Array) -> Interval:
    """The plain interval: verdicts of regression and of improvement do not use it, and it costs no resampling."""
    return normal_interval(float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5, len(values))


def groups_of(names: Sequence[str]) -> list[Group]:
    """The gated suites of some bundles at their real sizes, the smallest first: the shift falls on the weakest."""
    from eval.gates import load_gates
    from eval.prompts import load_suite

    found = []
    for name in names:
        gates = load_gates(name)
        for suite in dict.fromkeys(gate.suite for gate in gates.scores):
            metrics = [gate.metric for gate in gates.scores if gate.suite == suite]
            kinds: list[Kind] = [_KINDS.get(metric, "mean") for metric in metrics]
            for kind in dict.fromkeys(kinds):
                count = kinds.count(kind)
                found.append(Group(load_suite(suite).prompts.count, count, kind))
    return sorted(found, key=lambda group: group.prompts)


def _line(title: str, hits: int, nights: int) -> str:
    share = wilson(hits, nights)
    return f"{title}: {100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] of {nights:,} nights"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.power", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gates", nargs="+", default=["scenes-sdxl", "digits-sit"], help="default: %(default)s")
    parser.add_argument("--nights", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--shift", type=float, nargs="+", default=[0.1, 0.15, 0.2], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        if args.nights < 1:
            raise EvalError(f"--nights is {args.nights}; use 1 or more")
        groups = groups_of(args.gates)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    sizes = ", ".join(f"{group.gates} × {group.prompts:,} ({group.kind})" for group in groups)
    print(f"{sum(group.gates for group in groups)} gates: {sizes}")
    quiet = simulate(groups, nights=args.nights, seed=args.seed)
    print(_line("false alarms", quiet.alarms, quiet.nights))
    print(_line("second panels for nothing", quiet.suspicions, quiet.nights))
    for shift in args.shift:
        found = simulate(groups, nights=args.nights, shift=shift, seed=args.seed)
        print(_line(f"a drop of {shift:g} sd found and named", found.named, found.nights), end="; ")
        print(f"others named on {found.misnamed}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
