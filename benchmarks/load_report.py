"""The result of a load test as JSON and as one page without foreign hosts: bars, plots as SVG, and tables."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

COLOURS = ("#1c7a45", "#3c8fa3", "#a8701a", "#a8321f", "#6b4fa0", "#566459")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 320, 60, 40, 64
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#14241c}
svg{margin:0 12px 12px 0;max-width:100%;height:auto}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 9px;border-bottom:1px solid #d5dacb;text-align:right;white-space:nowrap}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}.met{color:#1c7a45}.missed{color:#a8321f}"""


class Bar(NamedTuple):
    """A promise, what was found, and whether it was kept."""

    name: str
    asked: str
    found: str
    met: bool


def write_report(result: dict[str, Any], path: Path) -> list[Path]:
    """Write PATH and the page beside it; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    judged = [bar._asdict() for bar in bars(result)]
    path.write_text(json.dumps(result | {"bars": judged}, indent=1) + "\n")
    page = path.with_suffix(".html")
    page.write_text(render(result))
    return [path, page]


def _over(other: str, least: float, ours: float, theirs: float) -> Bar:
    """Goodput against another server's, which may be 0."""
    seen = f"{ours / theirs:.2f}" if theirs else f"{ours:g} against 0"
    return Bar(f"goodput over {other}", f"≥ {least:g}", seen, ours > 0 and ours >= least * theirs)


def bars(result: dict[str, Any]) -> list[Bar]:
    """Every promise that this run can judge. Rates of goodput are compared at the best offered rate of each server."""
    found: list[Bar] = []
    first = [row for row in result["rows"] if row["trace"] == result["traces"][0]]
    best = {name: max(row["goodput"] for row in first if row["server"] == name) for name in _servers(first)}
    for other, least in (("batching", 1.3), ("naive", 3.0)):
        if {other, "ours"} <= best.keys():
            found.append(_over(other, least, best["ours"], best[other]))
    if "ours" in result["saturation_parts"]:
        part = max(median(parts) for parts in result["saturation_parts"]["ours"].values())
        found.append(Bar("throughput at saturation of the bare runtime's", "≥ 90 %", f"{part:.0%}", part >= 0.9))
    ours = [run for row in result["rows"] if row["server"] == "ours" for run in row["runs"]]
    if eta := [run["eta_error"]["p90"] for run in ours if "eta_error" in run]:
        found.append(Bar("p90 of the ETA's error, median of runs", "< 25 %", f"{median(eta):.0%}", median(eta) < 0.25))
    seen = f"{result['different']} of {result['compared']}"
    found.append(Bar("answers that differ from those made alone", "0", seen, result["different"] == 0))
    agreed = bool(result["metrics_agree"])
    found.append(Bar("every request accounted for by client and server", "yes", "yes" if agreed else "no", agreed))
    if after := result["recovery"]:
        p99 = [_number(after[key] and after[key]["p99"]) for key in ("latency_ms_before", "latency_ms_after")]
        told = f"{p99[0]} → {p99[1]} ms, queue empty after {after['drain_s']:g} s"
        found.append(Bar("p99 back after an overload, one queue drain later", "≤ 1.25 ×", told, after["returned"]))
        grown = f"{after['memory_growth']:+.1%}"
        found.append(Bar("memory during the overload", "< +5 %", grown, after["memory_flat"]))
    return found


def render(result: dict[str, Any]) -> str:
    """The page."""
    cores = result["cores"]
    shared = " (shared)" if cores["client"] == cores["servers"] else ""
    facts = (
        f"{result['bundle']} on {result['runtime']}, {result['repeats']} × {result['seconds']:g} s per trace and rate, "
        f"{result['threads']} threads; {result['processor']}, client on {len(cores['client'])} and servers on "
        f"{len(cores['servers'])} cores{shared}; revision {result['revision']}; bare runtime "
        f"{result['capacity_per_s']:g} answers/s in its best batches"
    )
    slo = ", ".join(f"{_work(work)} {value:g} ms" for work, value in result["slo_ms"].items())
    judged = "".join(
        f'<li class="{"met" if bar.met else "missed"}">{"✓" if bar.met else "✗"} {html.escape(bar.name)}: '
        f"{html.escape(bar.found)} (asked: {html.escape(bar.asked)})</li>"
        for bar in bars(result)
    )
    first = [row for row in result["rows"] if row["trace"] == result["traces"][0]]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load test</title><style>{STYLE}</style>
<h1>Load test</h1><p>{html.escape(facts)}.</p><p>In time: within {html.escape(slo)}. Latency counts from the time at
which a request should have been sent. Points are medians of the repeats, bars their range.</p>
<p><code>{html.escape(result["command"])}</code></p><ul>{judged}</ul>
<h2>Trace “{html.escape(result["traces"][0])}” by offered rate</h2>
{curves(first, result["capacity_per_s"])}{tables(result)}{saturation(result)}{recovered(result["recovery"])}</html>
"""


def curves(rows: Sequence[dict[str, Any]], capacity: float) -> str:
    """Of one trace, over the offered rate."""
    shown: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("Goodput (answers in time per second)", lambda run: run["goodput"]),
        ("p50 latency (ms)", lambda run: run["latency_ms"] and run["latency_ms"]["p50"]),
        ("p99 latency (ms)", lambda run: run["latency_ms"] and run["latency_ms"]["p99"]),
        ("Refused (part of all)", lambda run: (run["rejected"] + run["deadline"]) / max(1, run["sent"])),
    ]
    plots = []
    for title, value in shown:
        series: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in rows:
            if values := [v for run in row["runs"] if (v := value(run)) is not None]:
                point = (row["rate"] * capacity, median(values), min(values), max(values))
                series.setdefault(row["server"], []).append(point)
        plots.append(plot(title, series, "requests per second", log="latency" in title))
    return "".join(plots)


def tables(result: dict[str, Any]) -> str:
    """One table per trace."""
    parts = []
    for trace in result["traces"]:
        rows = [row for row in result["rows"] if row["trace"] == trace]
        cells = [_cells(row) for row in rows]
        heads = list(dict.fromkeys(name for row in cells for name in row))
        filled = [name for name in heads if any(row[name] for row in cells)]
        lines = ["".join(f"<td>{html.escape(row[name])}</td>" for name in filled) for row in cells]
        head = "".join(f"<th>{name}</th>" for name in filled)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(f'<h2>{html.escape(trace)}</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>')
    return "".join(parts)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of a table, by heading; an empty text where nothing was measured."""
    runs, (low, high) = row["runs"], row["goodput_spread"]

    def middle(*path: str) -> float | None:
        values = []
        for run in runs:
            for key in path:
                run = run and run.get(key)
            if run is not None:
                values.append(run)
        return median(values) if values else None

    def part(*path: str) -> str:
        value = middle(*path)
        return "" if value is None else f"{value:.0%}"

    counts = {
        name: sum(run[name] for run in runs) for name in ("rejected", "deadline", "cancelled", "invalid", "failed")
    }
    return {
        "server": row["server"],
        "rate": f"{row['rate']:g}",
        "goodput": f"{row['goodput']:.2f} [{low:.2f}, {high:.2f}]",
        "in time": part("in_time"),
        **{f"{q} ms": _number(middle("latency_ms", q)) for q in ("p50", "p90", "p99", "max")},
        "queue p50": _number(middle("queue_ms", "p50")),
        "queue p99": _number(middle("queue_ms", "p99")),
        "service p50": _number(middle("service_ms", "p50")),
        "preview p50": _number(middle("first_preview_ms", "p50")),
        "sent": str(sum(run["sent"] for run in runs)),
        "ok": str(sum(run["ok"] for run in runs)),
        **{name: str(count) if count else "" for name, count in counts.items()},
        "left": str(sum(run["disconnected"] for run in runs) or ""),
        "ETA p90": part("eta_error", "p90"),
        "Jain, work": _number(middle("fairness_works", "jain"), 3),
        "Jain, keys": _number(middle("fairness_keys", "jain"), 3),
        "cores busy": _number(middle("server_cores_busy"), 2),
        "client": _number(middle("client_cores_busy"), 2),
        "MB": _number(middle("memory_mb"), 0),
        "kB/s": _number((middle("bytes_per_s") or 0.0) / 1e3, 0),
    }


def saturation(result: dict[str, Any]) -> str:
    """Closed loops beside the bare runtime."""
    lines = []
    for name, by_clients in result["saturation_per_s"].items():
        alone = ", ".join(f"{_work(work)} {value:g} ms" for work, value in result["solo_ms"][name].items())
        parts = result["saturation_parts"][name]
        rates = ", ".join(
            f"{clients}: {median(rates):.2f}/s ({median(parts[clients]):.0%})" for clients, rates in by_clients.items()
        )
        lines.append(f"<li>{html.escape(f'{name}: {rates}; alone {alone}')}</li>")
    head = "Clients that never wait, and parts of the bare runtime's best rate"
    return f"<h2>{head}</h2><ul>{''.join(lines)}</ul>"


def recovered(found: dict[str, Any] | None) -> str:
    """Latency, queue and memory before, during and after the overload."""
    if found is None:
        return ""
    p99 = [(w["at_s"], w["latency_ms"]["p99"]) for w in found["windows"] if w["latency_ms"]]
    refused = [(w["at_s"], w["rejected"] / max(1, w["ok"] + w["rejected"])) for w in found["windows"]]
    plots = (
        ("p99 latency by scheduled time (ms)", p99),
        ("Refused (part of all)", refused),
        ("Waiting pictures", found["waiting"]),
        ("Memory of the server (MB)", found["memory"]),
    )
    text = (
        f"{found['overload_s']:g} s at twice the capacity between {found['calm_s']:g} s at half of it: "
        f"{found['sent']} sent, {found['ok']} answered, {found['rejected']} refused, {found['failed']} failed"
    )
    lines = [
        plot(title, {"ours": [(x, y, y, y) for x, y in points]}, "seconds", log="latency" in title)
        for title, points in plots
    ]
    return f"<h2>Overload</h2><p>{html.escape(text)}.</p>{''.join(lines)}"


Points = Mapping[str, Sequence[tuple[float, float, float, float]]]


def plot(title: str, series: Points, axis: str, log: bool = False) -> str:
    """Lines of (x, y, least y, most y) by name; x from zero, y from zero or, by log, over powers of ten."""
    points = [point for line in series.values() for point in line]
    rights, tops = ticks(max((p[0] for p in points), default=1.0)), ticks(max((p[3] for p in points), default=1.0))
    if log:
        low = math.floor(math.log10(max(1e-3, min((p[2] for p in points), default=1.0))))
        high = math.ceil(math.log10(max(1e-2, max((p[3] for p in points), default=1.0))))
        tops = [10.0**k for k in range(low, max(high, low + 1) + 1)]

    def height(y: float) -> float:
        """Part of the way up."""
        return math.log10(max(y, tops[0]) / tops[0]) / math.log10(tops[-1] / tops[0]) if log else y / tops[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / rights[-1] * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - height(y) * (HEIGHT - BOTTOM - TOP)

    parts = [f"<title>{html.escape(title)}</title>"]
    parts.append(f'<text x="{LEFT}" y="16" font-weight="600">{html.escape(title)}</text>')
    for value in tops:
        y = place(0.0, value)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d5dacb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in rights:
        x = place(value, tops[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(axis)}</text>')
    for k, (name, line) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        parts.append(_line(name, sorted(line), colour, place))
        if len(series) > 1:
            x, y = LEFT + 130 * (k % 3), 34 + 16 * (k // 3)
            parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12" role="img">{"".join(parts)}</svg>'


def ticks(most: float) -> list[float]:
    """Up to six round numbers from zero to ``most`` or just beyond it."""
    power = 10.0 ** math.floor(math.log10(most / 5)) if most > 0 else 0.2
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if most <= 5 * power * k)
    return [round(step * k, 12) for k in range(math.ceil(most / step) + 1)] if most > 0 else [0.0, 1.0]


def _line(
    name: str,
    line: Sequence[tuple[float, float, float, float]],
    colour: str,
    place: Callable[[float, float], tuple[float, float]],
) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _, _ in line)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, y, low, high in line if len(line) < 30 else []:
        (px, py), (_, y0), (_, y1) = place(x, y), place(x, low), place(x, high)
        parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y0:.1f}" y2="{y1:.1f}" stroke="{colour}"/>')
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"><title>{html.escape(name)}</title></circle>'
        )
    return "".join(parts)


def _servers(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["server"] for row in rows))


def _work(work: str) -> str:
    steps, _, frames = work.partition("x")
    return f"{steps} step{'' if steps == '1' else 's'}" + (f" × {frames} frames" if frames else "")


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
