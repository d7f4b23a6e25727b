"""The result of a load test as JSON and as one page without foreign hosts: plots as SVG, and the table behind them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

COLOURS = ("#1c7a45", "#63b6cb", "#d8a23a", "#b7643f")
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 280, 60, 40


def write_report(result: dict[str, Any], path: Path) -> list[Path]:
    """Write PATH and the page beside it; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    page = path.with_suffix(".html")
    page.write_text(render(result))
    return [path, page]


def render(result: dict[str, Any]) -> str:
    """The page."""
    capacity = result["capacity_per_s"]
    rows = result["rows"]
    names = list(dict.fromkeys(row["server"] for row in rows))
    goodput = {n: [(r["rate"] * capacity, r["goodput"]) for r in rows if r["server"] == n] for n in names}
    tail = {
        n: [(r["rate"] * capacity, value) for r in rows if r["server"] == n and (value := middle(r, "p99")) is not None]
        for n in names
    }
    facts = (
        f"{result['bundle']}, trace {result['trace']}, {result['repeats']} × {result['seconds']:g} s per rate, "
        f"{result['threads']} threads on {result['cores']} cores ({result['processor']}), "
        f"revision {result['revision']}; "
        f"bare runtime {capacity:g} pictures/s; {result['pictures_different']} of {result['pictures_compared']} "
        f"pictures differ from those made alone; the server's counts "
        f"{'agree' if result['metrics_agree'] else 'do not agree'} with the clients'"
    )
    slo = ", ".join(f"{steps} steps {value:g} ms" for steps, value in result["slo_ms"].items())
    plots = plot("Goodput (answers in time per second)", goodput) + plot("p99 latency (ms)", tail)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Load test</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#14241c}}
svg{{margin:0 1em 1em 0}}table{{border-collapse:collapse}}
td,th{{padding:3px 10px;border-bottom:1px solid #d5dacb;text-align:right}}
td:first-child,th:first-child{{text-align:left}}</style>
<h1>Load test</h1><p>{html.escape(facts)}.</p><p>In time: within {html.escape(slo)}.</p>
{plots}{table(result)}{saturation(result)}</html>
"""


def middle(row: dict[str, Any], quantile: str) -> float | None:
    """Median over the repeats of one quantile of the latency."""
    values = [run["latency_ms"][quantile] for run in row["runs"] if run["latency_ms"]]
    return median(values) if values else None


def table(result: dict[str, Any]) -> str:
    head = (
        "server",
        "rate",
        "goodput",
        "in time",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "rejected",
        "deadline",
        "failed",
        "ETA p90",
    )
    lines = []
    for row in result["rows"]:
        runs = row["runs"]
        low, high = row["goodput_spread"]
        eta = [run["eta_error"]["p90"] for run in runs if "eta_error" in run]
        cells = [
            row["server"],
            f"{row['rate']:g}",
            f"{row['goodput']:.2f} [{low:.2f}, {high:.2f}]",
            f"{100 * median(run['in_time'] for run in runs):.1f} %",
            *(_number(middle(row, q)) for q in ("p50", "p90", "p99")),
            *(str(sum(run[name] for run in runs)) for name in ("rejected", "deadline", "failed")),
            f"{100 * median(eta):.0f} %" if eta else "",
        ]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(lines)}</table>"


def saturation(result: dict[str, Any]) -> str:
    """Closed loop, beside the bare runtime."""
    lines = []
    for name, rates in result["saturation_per_s"].items():
        alone = ", ".join(f"{steps} steps {value:g} ms" for steps, value in result["solo_ms"][name].items())
        part = median(rates) / result["capacity_per_s"]
        text = f"{name}: {median(rates):.2f} per second, {part:.0%} of the bare runtime; alone {alone}"
        lines.append(f"<li>{html.escape(text)}</li>")
    return f"<h2>16 clients that never wait</h2><ul>{''.join(lines)}</ul>"


def plot(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over the offered rate, both axes from zero."""
    points = [point for line in series.values() for point in line]
    right, top = (max((p[axis] for p in points), default=1.0) * 1.05 or 1.0 for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / right * (WIDTH - LEFT - 10), HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 30)

    parts = [f'<text x="{LEFT}" y="16" font-weight="600">{html.escape(title)}</text>']
    for k in range(5):
        x, y = place(right * k / 4, top * k / 4)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d5dacb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * k / 4:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{right * k / 4:.3g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">requests per second</text>')
    for colour, (name, line) in zip(COLOURS, series.items(), strict=False):
        where = [place(*point) for point in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in where]
        y = 34 + 16 * list(series).index(name)
        parts.append(f'<text x="{LEFT + 10}" y="{y}" fill="{colour}">{html.escape(name)}</text>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="12" role="img">{"".join(parts)}</svg>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
