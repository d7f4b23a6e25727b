"""Small drawings of a report, as SVG text that stands in a page. Colours come from the page's style sheet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple

from markupsafe import Markup, escape

_W, _H, _PAD = 320, 96, 8


def bar(row: dict[str, Any]) -> Markup:
    """A change with its interval around 0, the margin shaded; worse is left, whatever the metric's direction."""
    change, margin = row["change"], row["margin"]
    low, high = change["low"], change["high"]
    if low is None or high is None:
        return Markup("")
    reach = 1.15 * max(abs(low), abs(high), margin)

    def x(value: float) -> float:
        return float(round(100 + 96 * value / reach, 1))

    return Markup(
        '<svg class="bar" viewBox="0 0 200 18" role="img" aria-label="{label}">'
        '<rect class="margin" x="{left}" y="2" width="{width}" height="14"/>'
        '<line class="zero" x1="100" x2="100" y1="0" y2="18"/>'
        '<line class="interval" x1="{low}" x2="{high}" y1="9" y2="9"/>'
        '<circle class="dot" cx="{dot}" cy="9" r="4"/></svg>'
    ).format(
        label=f"change {change['delta']:.3g}, interval {low:.3g} to {high:.3g}, positive is better",
        left=x(-margin),
        width=round(x(margin) - x(-margin), 1),
        low=x(low),
        high=x(high),
        dot=x(change["delta"]),
    )


def history(row: dict[str, Any], nights: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """A gate's value over its nights with intervals, the baseline as a line; missing nights leave a gap.

    nights: rows of the store, in any order. Returns {key, svg, from, to}, or None when no night measured the gate.
    """
    points = sorted(point for night in nights if (point := _point(night, row["key"])))
    if not points:
        return None
    level = (row["baseline"] or {}).get("value")
    values = [end for point in points for end in (point.value, point.low, point.high)]
    values += [level] if level is not None else []
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = low - room, high + room
    first, last = points[0].day.toordinal(), points[-1].day.toordinal()

    def x(day: date) -> float:
        share = 0.5 if first == last else (day.toordinal() - first) / (last - first)
        return round(_PAD + (_W - 2 * _PAD) * share, 1)

    def y(value: float) -> float:
        return float(round(_H - _PAD - (_H - 2 * _PAD) * (value - low) / (high - low), 1))

    parts = [f'<svg class="history" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(row["key"])}">']
    if level is not None:
        parts.append(f'<line class="level" x1="0" x2="{_W}" y1="{y(level)}" y2="{y(level)}"/>')
    for before, after in itertools.pairwise(points):
        if after.day.toordinal() - before.day.toordinal() == 1:
            ends = f'x1="{x(before.day)}" y1="{y(before.value)}" x2="{x(after.day)}" y2="{y(after.value)}"'
            parts.append(f'<line class="path" {ends}/>')
    for p in points:
        parts.append(f'<line class="whisker" x1="{x(p.day)}" x2="{x(p.day)}" y1="{y(p.low)}" y2="{y(p.high)}"/>')
        title = f"<title>{p.day}: {p.value:.5g}, {escape(p.verdict)}</title>"
        place = f'cx="{x(p.day)}" cy="{y(p.value)}" r="3.5"'
        parts.append(f'<circle class="dot {escape(p.verdict)}" {place}>{title}</circle>')
    span = {"from": points[0].day, "to": points[-1].day}
    return {"key": row["key"], "svg": Markup("".join([*parts, "</svg>"])), **span}


class _Point(NamedTuple):
    day: date
    value: float
    low: float
    high: float
    verdict: str


def _point(night: dict[str, Any], key: str) -> _Point | None:
    row = next((row for row in night["outcome"]["rows"] if row["key"] == key), None)
    if row is None or row["candidate"] is None:
        return None
    value, low, high = (row["candidate"][name] for name in ("value", "low", "high"))
    low, high = (value if end is None else end for end in (low, high))
    return _Point(date.fromisoformat(night["night"]), value, low, high, row["verdict"])
