"""What a comparison of training methods found: intervals over training seeds and prompts, a table and a figure.

Every method was trained from several seeds and every student was scored on the same prompts, so numbers form a table
of seeds by prompts whose rows and columns both count as drawn at random. Differences are taken per seed and prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eval.statistics import LEVEL, Interval, bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
RESAMPLES = 1000
COLOUR, FAINT = "#2e6fc8", "#9db9dc"


@dataclass(frozen=True)
class Measure:
    """One metric of one way to score, of all runs on one clock. better: +1 or −1, 0 where neither is better.

    runs: by variant and training seed the run's own value and one number per prompt, in the order of ``prompts``,
    whose mean is that value (values, or for FID and KID the value plus each prompt's influence on it).
    """

    clock: str
    title: str
    unit: str
    better: int
    runs: dict[str, dict[int, Array]]
    trained_on: bool = False


def crossed_mean(table: Array, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean of (seeds, prompts) with an interval over both; n counts seeds.

    Rows and columns are resampled independently ("pigeonhole bootstrap", Owen 2007), which never understates the
    standard error; the interval is ± t·se with Student's t of n − 1 degrees, because percentiles of a bootstrap over
    a handful of seeds are too narrow. One seed alone leaves the prompts: their interval says nothing of training.
    """
    seeds, prompts = table.shape
    if seeds == 1:
        return bootstrap_mean(table[0], level=level, seed=seed) if prompts > 1 else bootstrap_mean(table.mean(1))
    value, rng = float(table.mean()), np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    means = np.empty(RESAMPLES)
    block = max(1, 4_000_000 // prompts)
    for start in range(0, RESAMPLES, block):
        chosen = rows[start : start + block]
        weights = rng.poisson(1.0, (len(chosen), prompts)) if prompts > 1 else np.ones((len(chosen), 1))
        means[start : start + block] = ((chosen @ (table - value)) * weights).sum(1) / weights.sum(1).clip(min=1)
    se = float(means.std()) * math.sqrt(seeds / (seeds - 1))
    half = student_t(seeds - 1, level) * se
    return Interval(value, value - half, value + half, se, seeds)


def student_t(degrees: int, level: float = LEVEL) -> float:
    """Two-sided quantile of Student's t, by bisection of its distribution function for whole degrees of freedom."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < level else (low, middle)
    return high


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t): the finite sums of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return math.sin(angle) * total


def mean_of(measure: Measure, variant: str) -> Interval | None:
    """The variant's mean over its seeds and prompts; None without a finished run."""
    runs = measure.runs.get(variant, {})
    return crossed_mean(np.stack([runs[seed] for seed in sorted(runs)])) if runs else None


def difference_of(measure: Measure, variant: str, reference: str) -> Interval | None:
    """Variant − reference, paired by training seed and prompt; None when they share no seed."""
    ours, theirs = measure.runs.get(variant, {}), measure.runs.get(reference, {})
    shared = sorted(ours.keys() & theirs.keys())
    return crossed_mean(np.stack([ours[seed] - theirs[seed] for seed in shared])) if shared else None


# --- the table -----------------------------------------------------------------------------------------------------


def markdown(measures: Sequence[Measure], variants: Sequence[str]) -> str:
    """Means, then differences from the first variant, one table per clock."""
    parts = []
    for clock in dict.fromkeys(m.clock for m in measures):
        own = [m for m in measures if m.clock == clock]
        parts.append(f"### At equal {clock}\n\n{_means(own, variants)}\n\n{_differences(own, variants)}")
    return "\n\n".join(parts)


def _means(measures: Sequence[Measure], variants: Sequence[str]) -> str:
    rows = [["", *(_head(m) for m in measures)]]
    rows += [[variant, *(_cell(mean_of(m, variant)) for m in measures)] for variant in variants]
    return _table(rows)


def _differences(measures: Sequence[Measure], variants: Sequence[str]) -> str:
    rows = [[f"minus {variants[0]}", *(_head(m) for m in measures)]]
    for variant in variants[1:]:
        found = [difference_of(m, variant, variants[0]) for m in measures]
        rows.append([variant, *(_cell(d, signed=True) for d in found)])
    return _table(rows) if len(rows) > 1 else "There is one variant, so there is no difference."


def _head(measure: Measure) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[measure.better]
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.title}{unit}{arrow}{' †' if measure.trained_on else ''}"


def _cell(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "–"
    plus = "+" if signed else ""
    spread = interval.high - interval.low
    known = math.isfinite(spread) and spread > 0
    digits = _digits(spread if known else abs(interval.value))
    text = f"{interval.value:{plus}.{digits}f}"
    if math.isfinite(spread):
        text += f" [{interval.low:{plus}.{digits}f}, {interval.high:{plus}.{digits}f}]"
    return f"**{text}**" if signed and (interval.low > 0 or interval.high < 0) else text


def _digits(size: float) -> int:
    """Decimals that show two figures of a number of this size."""
    return 0 if size <= 0 else min(6, max(0, 1 - math.floor(math.log10(size))))


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# --- the figure ----------------------------------------------------------------------------------------------------


_ACROSS = 5
"""Panels beside each other, so that a page shows them at a size that can be read."""


def draw(measures: Sequence[Measure], variants: Sequence[str], out: Path) -> None:
    """One panel per clock and metric: each variant's difference from the first, its interval and its seeds."""
    control, *others = variants
    if not others:
        return  # nothing to contrast
    from matplotlib.figure import Figure

    clocks = list(dict.fromkeys(m.clock for m in measures))
    rows = [
        own[i : i + _ACROSS]
        for clock in clocks
        if (own := [m for m in measures if m.clock == clock])
        for i in range(0, len(own), _ACROSS)
    ]
    columns = max(map(len, rows))
    size = (2.2 + 2.9 * columns, 0.6 + (0.85 + 0.28 * len(others)) * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for panels, own in zip(grid, rows, strict=True):
        for axes, measure in zip(panels, own, strict=False):
            _draw_measure(axes, measure, control, others)
        for axes in panels[len(own) :]:
            axes.set_visible(False)
        panels[0].set_ylabel(f"equal {own[0].clock}")
    figure.suptitle(f"Difference from {control}: mean with 95 % interval, a dot per training seed", fontsize=10)
    figure.savefig(out, dpi=110)


def _draw_measure(axes: Axes, measure: Measure, control: str, others: Sequence[str]) -> None:
    reference = measure.runs.get(control, {})
    axes.axvline(0, color="#888888", lw=1)
    for place, variant in enumerate(others):
        found = difference_of(measure, variant, control)
        if found is None:
            continue
        runs = measure.runs[variant]
        dots = [float(runs[seed].mean() - reference[seed].mean()) for seed in sorted(runs.keys() & reference.keys())]
        axes.plot(dots, [place + 0.2] * len(dots), "o", ms=3, color=FAINT)
        axes.plot([found.low, found.high], [place, place], color=COLOUR, lw=2)
        axes.plot(found.value, place, "o", ms=6, color=COLOUR)
    axes.set_yticks(range(len(others)), others)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_title(_head(measure).replace(" (", "\n(", 1), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.grid(axis="x", alpha=0.3)
