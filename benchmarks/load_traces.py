"""What a load test sends, and when: seeded lists of arrivals, so that every server gets the same.

Open loop: arrivals come at their times whether or not earlier ones were answered, as those of strangers do; latency is
counted from the scheduled time, so a server that stalls cannot hide it by slowing its clients down.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Trace = Literal["single", "mixed", "burst", "ragged", "repeat", "abuse"]
TRACES: tuple[Trace, ...] = get_args(Trace)
Kind = Literal["picture", "disconnect", "invalid", "oversize"]

WORDS = ("small", "large", "red", "blue", "green", "metal", "rubber", "sphere", "cube", "cylinder", "left", "of")
BURST_S = 2.0
"""A burst lasts this long and so does the silence after it; the mean rate is the rate asked for."""
REPEATED = 50
"""Different requests of the trace "repeat"; the k-th is asked for in proportion to 1/k."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and what it asks for."""

    at: float
    prompt: str
    seed: int
    steps: int
    cache: bool = False
    kind: Kind = "picture"


def make_trace(name: Trace, rate: float, seconds: float, steps: Sequence[int], seed: int = 0) -> list[Arrival]:
    """Poisson arrivals at ``rate`` per second.

    single: the largest number of steps; mixed: every number of steps equally often; burst: mixed, on and off; ragged:
    prompts of 1 to 40 words; repeat: few different requests that may come from a cache; abuse: mixed with 5 % clients
    that leave, 2 % invalid and 2 % oversized requests.
    """
    dice = random.Random(f"{name} {seed}")
    arrivals, now = [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        at = _in_bursts(now) if name == "burst" else now
        count = max(steps) if name == "single" else dice.choice(list(steps))
        words = dice.randint(1, 40) if name == "ragged" else 6
        prompt = " ".join(["a", *(dice.choice(WORDS) for _ in range(words))])
        arrival = Arrival(at, prompt, dice.randrange(2**32), count, kind=_kind(dice) if name == "abuse" else "picture")
        if name == "repeat":
            k = dice.choices(range(REPEATED), [1 / (k + 1) for k in range(REPEATED)])[0]
            arrival = Arrival(at, f"a {WORDS[k % len(WORDS)]} cube", k, steps[k % len(steps)], cache=True)
        arrivals.append(arrival)
    return arrivals


def _in_bursts(now: float) -> float:
    """Time in which the first half of every period holds all that a whole period would."""
    period, phase = divmod(now, 2 * BURST_S)
    return period * 2 * BURST_S + phase / 2


def _kind(dice: random.Random) -> Kind:
    draw = dice.random()
    if draw < 0.05:
        return "disconnect"
    return "invalid" if draw < 0.07 else "oversize" if draw < 0.09 else "picture"
