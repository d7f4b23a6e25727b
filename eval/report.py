"""The report of a night: one HTML page that needs nothing else, and a Markdown summary. Verdict first.

    python -m eval.report                          # the newest night of every bundle, into runs/nightly/<night>
    python -m eval.report --night 2026-11-23 --out /tmp/report

Everything comes from the store; pictures and clips come from the cache of generations as long as they are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.drift import LIMIT, Drift, drift_of
from eval.errors import EvalError
from eval.gate import decimals
from eval.notify import headline
from eval.pairing import COSTS
from eval.pictures import data_url, fps_of, pictures
from eval.plots import bar, history
from eval.run import DEFAULT_CACHE, DEFAULT_STORE
from eval.store import Store

Record = dict[str, Any]
Key = tuple[str, int]
TEMPLATE = Path(__file__).parent / "report.html"
ORDER = ("regression", "broken", "invalid", "not comparable", "inconclusive", "improvement", "equivalent")
"""What somebody who was woken wants to see first."""
DAYS = 14
"""Nights back in which a missing one is shown."""
_RANDOM = 4
_PIXELS = 128
"""Pictures are enlarged to about this by whole factors."""


# --- what is shown -------------------------------------------------------------------------------------------------


def calendar(nights: Sequence[dict[str, Any]], night: str, expected_by: str) -> list[dict[str, str]]:
    """The last DAYS dates up to ``night``: verdict, "missing", or a verdict with the hour of a late start.

    Dates before the first night on record are not missing.
    """
    by_date = {row["night"]: row for row in nights}
    last = date.fromisoformat(night)
    days = [(last - timedelta(days=back)).isoformat() for back in range(DAYS - 1, -1, -1)]
    found = []
    for day in (day for day in days if day >= min(by_date, default=night)):
        row = by_date.get(day)
        if row is None:
            found.append({"night": day, "verdict": "missing", "late": ""})
            continue
        started = row["started"]
        late = started if started[:10] > day or started[11:16] > expected_by else ""
        found.append({"night": day, "verdict": row["verdict"], "late": late[:16].replace("T", " ")})
    return found


def score_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A gate's numbers as text, in the metric's own sign."""
    ours, theirs, change = row["candidate"], row["baseline"], row.get("change")
    cells = {
        "key": row["key"],
        "verdict": row["verdict"],
        "note": row["note"],
        "watched": row["watched"],
        "arrow": "↑" if row["direction"] == "higher" else "↓",
        "unit": row["unit"],
        "drift": row["drift"],
    }
    spread = change["se"] if change and change["se"] else (abs(ours["value"]) / 100 if ours else 0.0)
    digits = decimals(spread or 0.0)
    cells["candidate"] = _number(ours, digits)
    cells["baseline"] = _number(theirs, digits)
    cells["n"] = f"{ours['n']:,}" + (" ‡" if ours["n"] < ours["smallest_n"] else "") if ours else ""
    if change:
        cells["change"] = _signed(row, change, digits)
        cells["details"] = f"p {row['p']:.2g} · margin {row['margin']:.3g} · detectable {_figure(row['mde'])}"
        cells["bar"] = bar(row)
        second = row.get("confirmation")
        if second:
            cells["second"] = _signed(row, second, digits)
    for name in ("history", "teacher"):
        if row.get(name):
            cells[name] = _signed(row, row[name], digits)
    kept = (row.get("teacher") or {}).get("retention")
    if kept:
        cells["teacher"] += f", keeps {kept['value']:.1f} % [{kept['low']:.1f}, {kept['high']:.1f}]"
    return cells


def drift_text(found: Drift | None) -> str:
    """A gate's slow drift in words; empty before there are two bundles to compare."""
    if found is None:
        return ""
    since = f" since {found.since}" if found.since else ""
    return f"{found.sum:.1f} of {LIMIT:g}{since}, {found.points} bundles" + (": look" if found.raised else "")


def curve_cells(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The curve over steps as a table: {steps, rows: [(metric, values)]}; None when there is none."""
    if not points:
        return None
    steps = sorted({point["steps"] for point in points})
    lines = []
    for metric in dict.fromkeys(point["metric"] for point in points):
        own = {point["steps"]: point for point in points if point["metric"] == metric}
        ends = [point[end] for point in own.values() for end in ("low", "high") if point[end] is not None]
        digits = decimals((max(ends) - min(ends)) / 10 if ends else 0.0)
        arrow = "↑" if own[steps[0]]["direction"] == "higher" else "↓"
        lines.append((f"{metric} {arrow}", [f"{own[k]['value']:.{digits}f}" if k in own else "–" for k in steps]))
    return {"steps": steps, "rows": lines}


def _number(result: Mapping[str, Any] | None, digits: int) -> str:
    return "–" if result is None else f"{result['value']:.{digits}f}"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _signed(row: dict[str, Any], change: dict[str, Any], digits: int) -> str:
    sign = 1 if row["direction"] == "higher" else -1
    text = f"{sign * change['delta'] + 0.0:+.{digits}f}"
    if change["low"] is None or change["high"] is None:
        return text
    low, high = sorted((sign * change["low"] + 0.0, sign * change["high"] + 0.0))
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def win_rate(store: Store, record: Record, row: dict[str, Any]) -> str:
    """Share of samples that are better, equal and worse than the baseline's; empty where that means nothing."""
    runs = [record["runs"].get(row["suite"]), (record["baseline"] or {}).get("runs", {}).get(row["suite"])]
    if None in runs or not row.get("change") or "worst" not in row:
        return ""
    results = store.results(str(runs[0]))[row["metric"]]
    if results["per_sample_kind"] != "value":
        return ""
    left, right = (store.per_sample(str(run), row["metric"]) for run in runs)
    sign = 1 if row["direction"] == "higher" else -1
    moved = np.array([sign * (left[key] - right[key]) for key in left if key in right])
    better, worse = 100 * float(np.mean(moved > 0)), 100 * float(np.mean(moved < 0))
    return f"better {better:.0f} %, equal {100 - better - worse:.0f} %, worse {worse:.0f} %"


# --- pictures and clips --------------------------------------------------------------------------------------------


def galleries(store: Store, record: Record, cache: Path) -> list[dict[str, Any]]:
    """Old beside new for every score that moved, and an equal number of samples drawn at random, per suite."""
    shown = []
    for row in record["rows"]:
        if row.get("worst") or row.get("best"):
            changes = [(tuple(key), change) for key, change in [*row.get("worst", []), *row.get("best", [])]]
            worst = len(row.get("worst", []))
            cells = _pairs(store, record, row["suite"], [key for key, _ in changes], cache)
            for place, (cell, (_, change)) in enumerate(zip(cells, changes, strict=True)):
                cell["kind"] = "worse" if place < worst else "better"
                cell["change"] = f"{change:+.3g}"
            shown.append({"title": f"{row['key']}: changed most", "cells": cells})
    for suite in dict.fromkeys(row["suite"] for row in record["rows"] if row.get("worst") or row.get("best")):
        keys = list(store.texts(record["runs"][suite]))
        rng = np.random.default_rng(int(record["night"].replace("-", "")))
        drawn = [keys[i] for i in rng.choice(len(keys), min(_RANDOM, len(keys)), replace=False)]
        cells = _pairs(store, record, suite, drawn, cache)
        shown.append({"title": f"{Path(suite).stem}: drawn at random, to compare with", "cells": cells})
    return shown


def worst_cases(store: Store, record: Record, cache: Path, count: int = 6) -> list[dict[str, Any]]:
    """Tonight's lowest-scored samples by the first metric that is a graded mean per sample."""
    for row in record["rows"]:
        run = record["runs"].get(row["suite"])
        if run is None or row["candidate"] is None or row["metric"] in COSTS:
            continue
        if store.results(run)[row["metric"]]["per_sample_kind"] != "value":
            continue
        values = store.per_sample(run, row["metric"])
        if len(set(values.values())) < 3:
            continue
        sign = 1 if row["direction"] == "higher" else -1
        keys = sorted(values, key=lambda key: sign * values[key])[:count]
        cells = _pairs(store, record, row["suite"], keys, cache)
        for cell, key in zip(cells, keys, strict=True):
            cell["kind"], cell["change"] = row["key"], f"{values[key]:.3g}"
        return [{"title": f"worst tonight by {row['key']}", "cells": cells}]
    return []


def _pairs(store: Store, record: Record, suite: str, keys: Sequence[Key], cache: Path) -> list[dict[str, Any]]:
    run = store.run(record["runs"][suite])
    before = (record["baseline"] or {}).get("runs", {}).get(suite)
    new = pictures(store, run, cache, keys)
    old = pictures(store, store.run(before), cache, keys) if before else {}
    texts = store.texts(run["id"])

    def shown(image: NDArray[np.uint8] | None) -> str:
        return "" if image is None else data_url(image, fps_of(run), side=_PIXELS)

    return [
        {"text": texts[key], "seed": key[1], "old": shown(old.get(key)), "new": shown(new.get(key)), "kind": ""}
        for key in keys
    ]


# --- the two forms -------------------------------------------------------------------------------------------------


def _bundle(store: Store, record: Record, cache: Path | None, expected_by: str) -> dict[str, Any]:
    rows = sorted(record["rows"], key=lambda row: (row["watched"], ORDER.index(row["verdict"])))
    record = record | {"rows": rows}
    nights = [row for row in store.nights(record["bundle"]) if row["night"] <= record["night"]]
    shown: dict[str, Any] = {
        "record": record,
        "headline": headline(record),
        "rows": [
            score_cells(row) | {"wins": win_rate(store, record, row), "slow": drift_of(row["key"], nights)}
            for row in record["rows"]
        ],
        "calendar": calendar(nights, record["night"], expected_by),
        "curve": curve_cells(record.get("curve", [])),
        "turns": record.get("turns", []),
    }
    if cache is not None:
        shown["plots"] = [plot for row in record["rows"] if (plot := history(row, nights)) is not None]
        shown["galleries"] = galleries(store, record, cache) + worst_cases(store, record, cache)
    return shown


def render(store: Store, records: Sequence[Record], *, cache: Path, expected_by: str = "04:00") -> str:
    """The page. Prompts and notes are text of strangers and are escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["drift_text"] = drift_text
    template = environment.from_string(TEMPLATE.read_text())
    bundles = [_bundle(store, record, cache, expected_by) for record in records]
    worst = min((record["verdict"] for record in records), key=ORDER.index)
    data = json.dumps(list(records), allow_nan=False).replace("<", "\\u003c")
    return template.render(bundles=bundles, worst=worst, night=records[0]["night"], data=data)


def markdown(store: Store, records: Sequence[Record], *, expected_by: str = "04:00") -> str:
    """The summary for a terminal, a chat or a step's page."""
    parts = []
    for record in records:
        shown = _bundle(store, record, None, expected_by)
        lines = [
            f"## {record['bundle']}, night {record['night']}: {record['verdict']}",
            "",
            _plain(shown["headline"]),
            "",
        ]
        lines += [f"- suspicious trade-off: {_plain(text)}" for text in record["trade_offs"]]
        lines += [f"- suspicious: {_plain(text)}" for text in record.get("turns", [])]
        lines += [f"- failed: {_plain(text)}" for text in record["failures"]]
        failed = [control for control in record["controls"] if not control["ok"]]
        lines += [f"- control failed: {control['damage']} on {control['metric']}" for control in failed]
        odd = [day for day in shown["calendar"] if day["late"] or day["verdict"] == "missing"]
        lines += [f"- night {day['night']}: {'late' if day['late'] else 'missing'}" for day in odd]
        lines += [f"- changed since {record['since']}: {_plain(text)}" for text in record["changes"]]
        slow = [row for row in shown["rows"] if row["slow"] and row["slow"].raised]
        lines += [f"- drifting slowly: {row['key']}, CUSUM {drift_text(row['slow'])}" for row in slow]
        lines += ["", "| gate | verdict | baseline | tonight | change, 95 % | samples |", "|---|---|---|---|---|---|"]
        for row in shown["rows"]:
            cells = [row["key"], row["verdict"] + (" (watched)" if row["watched"] else ""), row["baseline"]]
            cells += [f"{row['candidate']} {row['unit']} {row['arrow']}", row.get("change", "–"), row["n"]]
            lines.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def newest(store: Store, night: str | None) -> list[Record]:
    """Records of one night, or of the newest one, by bundle. Raises EvalError when there are none."""
    rows = store.nights()
    wanted = night or (rows[0]["night"] if rows else None)
    found = [row["outcome"] for row in rows if row["night"] == wanted]
    if not found:
        raise EvalError(f"{store.path} has no night {night or ''}; measure one with python -m eval.nightly")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--night", help="YYYY-MM-DD; default: the newest")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a folder; default: runs/nightly/<night>")
    args = parser.parse_args(arguments)
    try:
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; measure something first with python -m eval.nightly")
        with Store(args.store) as store:
            records = newest(store, args.night)
            page, summary = render(store, records, cache=args.cache), markdown(store, records)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    out = args.out or Path("runs/nightly") / records[0]["night"]
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("index.html", page), ("summary.md", summary)):
        (out / name).write_text(text)
    print(f"wrote {out / 'index.html'}, {out / 'summary.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
