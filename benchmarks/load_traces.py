"""What a load test sends, and when: seeded lists of arrivals, so that every server gets the same.

Open loop: arrivals come at their times whether or not earlier ones were answered, as those of strangers do; latency is
counted from the scheduled time, so a server that stalls cannot hide it by slowing its clients down.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Trace = Literal["mixed", "single", "burst", "ragged", "repeat", "abuse", "tenants", "video"]
TRACES: tuple[Trace, ...] = get_args(Trace)
Kind = Literal["ordinary", "disconnect", "cancel", "invalid", "oversize"]

WORDS = ("small", "large", "red", "blue", "green", "metal", "rubber", "sphere", "cube", "cylinder", "left", "of")
BURST_S = 2.0
"""A burst lasts this long and so does the silence after it; the mean rate is the rate asked for."""
REPEATED = 50
"""Different requests of the trace "repeat"; the k-th is asked for in proportion to 1/k."""
ABUSE: dict[Kind, float] = {"disconnect": 0.05, "cancel": 0.01, "invalid": 0.02, "oversize": 0.02}
TENANTS = (0.7, 0.1, 0.1, 0.1)
"""Parts of the requests by API key in the trace "tenants": one asks for most."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and what it asks for."""

    at: float
    prompt: str
    seed: int
    steps: int
    cache: bool = False
    kind: Kind = "ordinary"
    key: int = 0
    """Whose it is: a place in TENANTS."""
    frames: int = 0
    """Of a clip; 0: a picture."""

    @property
    def work(self) -> str:
        """Requests with the same work take equally long: "4" steps, or "4x17" steps and frames."""
        return f"{self.steps}x{self.frames}" if self.frames else str(self.steps)


def make_trace(
    name: Trace, rate: float, seconds: float, steps: Sequence[int], seed: int = 0, frames: Sequence[int] = (0,)
) -> list[Arrival]:
    """Poisson arrivals at ``rate`` per second.

    mixed: every number of steps (and of frames) equally often; single: the largest number of steps; burst: mixed, on
    and off; ragged: prompts of 1 to 40 words; repeat: few different requests that may come from a cache; abuse: mixed
    with 5 % clients that leave, 1 % that cancel, 2 % invalid and 2 % oversized requests; tenants: mixed of four API
    keys, of which one sends 70 %; video: mixed, for a bundle of videos.
    """
    dice = random.Random(f"{name} {seed}")
    arrivals, now = [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        at = _in_bursts(now) if name == "burst" else now
        count = max(steps) if name == "single" else dice.choice(list(steps))
        words = dice.randint(1, 40) if name == "ragged" else 6
        prompt = " ".join(["a", *(dice.choice(WORDS) for _ in range(words))])
        kind = _kind(dice) if name == "abuse" else "ordinary"
        key = dice.choices(range(len(TENANTS)), TENANTS)[0] if name == "tenants" else 0
        length = dice.choice(list(frames))
        arrival = Arrival(at, prompt, dice.randrange(2**32), count, kind=kind, key=key, frames=length)
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
    kinds: list[Kind] = ["ordinary", *ABUSE]
    return dice.choices(kinds, [1 - sum(ABUSE.values()), *ABUSE.values()])[0]
