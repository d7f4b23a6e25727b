"""A slow drift that no night shows: a CUSUM of a gate's changes against its baseline. Information, no gate.

Nights share prompts and seeds, so how lucky the panel was is in every night's change, and a plain sum of changes would
count it again each night. Summed are recursive residuals instead: each change less the mean of those before, which
removes what is common and leaves independent standard normals where nothing drifts (Brown, Durbin and Evans 1975).

    S_i = max(0, S_{i−1} − z_i − SLACK), raised beyond LIMIT (Page 1954)

    found = drift_of("scenes-trained/composition", store.nights(bundle))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SLACK = 0.5
"""Standard errors a night that are let pass."""
LIMIT = 5.5
"""With SLACK, what 3.3 % of gates without drift reach in 60 nights; tests/eval/test_drift.py counts them."""


@dataclass(frozen=True)
class Drift:
    """The sum after ``points`` different bundles. since: the night from which it has been above 0, None at 0."""

    sum: float
    points: int
    since: str | None

    @property
    def raised(self) -> bool:
        return self.sum > LIMIT


def recursive_residuals(changes: Sequence[float], errors: Sequence[float]) -> list[float]:
    """z_i = (x_i − mean of x_1 … x_{i−1}) / (se_i·√(1 + 1/(i − 1))), from the second on. errors: > 0."""
    total, found = 0.0, []
    for before, (change, error) in enumerate(zip(changes, errors, strict=True)):
        if before:
            found.append((change - total / before) / (error * math.sqrt(1 + 1 / before)))
        total += change
    return found


def cusum(residuals: Iterable[float], slack: float = SLACK) -> list[float]:
    """Page's sum after each residual, of falls: positive residuals are improvements."""
    sums: list[float] = []
    for residual in residuals:
        sums.append(max(0.0, (sums[-1] if sums else 0.0) - residual - slack))
    return sums


def drift_of(key: str, nights: Sequence[dict[str, Any]]) -> Drift | None:
    """Of one gate over all nights against the baseline of the newest; None before there are two points.

    nights: rows of the store, in any order. Nights in a row with the same weights are one point, the last of them:
    the same pictures again are no new evidence.
    """
    ordered = sorted((night["outcome"] for night in nights), key=lambda outcome: outcome["night"])
    pinned = (ordered[-1]["baseline"] or {}).get("pinned") if ordered else None
    points: list[tuple[str, float, float]] = []
    last = None
    for outcome in ordered:
        row = next((row for row in outcome["rows"] if row["key"] == key), None)
        change = row and row.get("change")
        if not change or not change["se"] or (outcome["baseline"] or {}).get("pinned") != pinned:
            continue
        digest = outcome["environment"].get("digest")
        if points and digest is not None and digest == last:
            points.pop()
        points.append((outcome["night"], change["delta"], change["se"]))
        last = digest
    if len(points) < 2:
        return None
    names, changes, errors = zip(*points, strict=True)
    sums = cusum(recursive_residuals(changes, errors))
    still = next((i for i in range(len(sums), 0, -1) if sums[i - 1] == 0), 0)
    return Drift(sums[-1], len(points), names[still + 1] if sums[-1] > 0 else None)
