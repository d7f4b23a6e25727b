"""Who is told, and how: a webhook, GitHub's step summary, JUnit XML. One alert per trouble, however long it lasts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from eval.regression import Verdict

Record = dict[str, Any]
_TROUBLE = {Verdict.REGRESSION: "regression", Verdict.BROKEN: "measurement", Verdict.INVALID: "measurement"}


def alert_of(record: Record, earlier: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What to send about a night, or None. earlier: the bundle's previous nights, newest first.

    A trouble has a key made of the bundle, its kind and the gates concerned. While a trouble that somebody was told of
    lasts, nothing is sent; the first night without trouble after that is sent as recovered.
    """
    key = _key(record)
    last = _key(earlier[0]["outcome"]) if earlier else None
    streak = list(itertools.takewhile(lambda row: _key(row["outcome"]) == last, earlier))
    told = last is not None and any(row["alerted"] for row in streak)
    if key is None:
        return _message(record, "recovered", last) if told else None
    if told and key == last:
        return None
    kind = "regression" if Verdict.REGRESSION in _verdicts(record) else "measurement"
    return _message(record, kind, key)


def _verdicts(record: Record) -> set[str]:
    return {row["verdict"] for row in record["rows"] if not row["watched"]}


def _key(record: Record) -> str | None:
    troubled = sorted(
        f"{_TROUBLE[Verdict(row['verdict'])]}:{row['key']}"
        for row in record["rows"]
        if Verdict(row["verdict"]) in _TROUBLE and not row["watched"]
    )
    if record["failures"] and not troubled:
        troubled = ["measurement:controls or second panel"]
    return hashlib.sha256("|".join([record["bundle"], *troubled]).encode()).hexdigest()[:16] if troubled else None


def _message(record: Record, kind: str, key: str | None) -> dict[str, Any]:
    return {"kind": kind, "key": key, "night": record["night"], "bundle": record["bundle"], "text": headline(record)}


def headline(record: Record) -> str:
    """The verdict in one sentence."""
    name, rows = record["bundle"], [row for row in record["rows"] if not row["watched"]]
    worse = [row for row in rows if row["verdict"] == Verdict.REGRESSION]
    if worse:
        return f"{name} got worse: {'; '.join(_change(row) for row in worse)}."
    for verdict, words in (
        (Verdict.BROKEN, "was not measured in full"),
        (Verdict.INVALID, "was measured by metrics that failed their control"),
        (Verdict.NOT_COMPARABLE, "cannot be compared with its baseline"),
    ):
        odd = [row for row in rows if row["verdict"] == verdict]
        if odd:
            return f"{name} {words}: {', '.join(row['key'] for row in odd)}. {odd[0]['note']}"
    drift = [row["key"] for row in rows if row["drift"]]
    if drift:
        return f"{name} is no worse than its baseline, but below its last nights in {', '.join(drift)}."
    better = [row for row in rows if row["verdict"] == Verdict.IMPROVEMENT]
    unknown = [row["key"] for row in rows if row["verdict"] == Verdict.INCONCLUSIVE]
    if better:
        tail = f" Not sure: {', '.join(unknown)}." if unknown else ""
        return f"{name} got better: {'; '.join(_change(row) for row in better)}.{tail}"
    if unknown:
        return f"{name}: no regression was found, and none beyond the margin can be excluded in {', '.join(unknown)}."
    return f"{name} is as good as its baseline in all {len(rows)} gates."


def _change(row: dict[str, Any]) -> str:
    sign = 1 if row["direction"] == "higher" else -1
    change = row["change"]
    low, high = sorted((sign * change["low"], sign * change["high"]))
    unit = f" {row['unit']}" if row["unit"] else ""
    return f"{row['key']} {sign * change['delta']:+.3g}{unit} [{low:+.3g}, {high:+.3g}]"


def send(url: str, alert: dict[str, Any], page: Path, *, timeout_s: float = 20.0) -> bool:
    """POST an alert as JSON: {text, kind, key, night, bundle, report}. False, and a line on stderr, when it fails."""
    body = json.dumps(alert | {"report": str(page)}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json", "user-agent": "leapfrog-nightly"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"error: nobody was told, the webhook failed: {error}; look at it and at {page}", file=sys.stderr)
        return False


def github_summary(text: str) -> None:
    """Append Markdown to the step's page where this runs as a GitHub action; else nothing."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a") as file:
            file.write(text + "\n")


def junit(records: Sequence[Record]) -> str:
    """A suite per bundle, a case per gate: regressions fail, broken measurements are errors, unknowns are skipped."""
    root = ET.Element("testsuites", {"name": "leapfrog nightly"})
    tags = {
        Verdict.REGRESSION: "failure",
        Verdict.BROKEN: "error",
        Verdict.INVALID: "error",
        Verdict.NOT_COMPARABLE: "error",
        Verdict.INCONCLUSIVE: "skipped",
    }
    for record in records:
        found = [tags.get(Verdict(row["verdict"])) if not row["watched"] else None for row in record["rows"]]
        counts = {
            f"{tag}s" if tag != "skipped" else tag: str(found.count(tag)) for tag in ("failure", "error", "skipped")
        }
        attributes = {"name": record["bundle"], "tests": str(len(found)), "time": f"{record['seconds']:.1f}", **counts}
        suite = ET.SubElement(root, "testsuite", attributes)
        for row, tag in zip(record["rows"], found, strict=True):
            case = ET.SubElement(suite, "testcase", {"classname": record["bundle"], "name": row["key"]})
            if tag is not None:
                message = row["note"] or (_change(row) if row.get("change") else row["verdict"])
                ET.SubElement(case, tag, {"message": message, "type": row["verdict"]})
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)
