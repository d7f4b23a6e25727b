"""Alerts: one per trouble, however long it lasts; a webhook that is really called; JUnit and GitHub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from eval.notify import alert_of, github_summary, headline, junit, send
from tests.eval.nights import KEYS, record, row

BAD = row(verdict="regression", delta=-5.0)


def past(outcome: dict[str, Any], alerted: bool = False) -> dict[str, Any]:
    return {"outcome": outcome, "alerted": int(alerted)}


def test_a_regression_is_told_once_and_its_end_once() -> None:
    good, bad = record(row()), record(BAD)
    first = alert_of(bad, [past(good)])
    assert first is not None and first["kind"] == "regression" and "composition -5 %" in first["text"]
    assert alert_of(bad, [past(bad, alerted=True), past(good)]) is None
    assert alert_of(bad, [past(bad), past(bad, alerted=True)]) is None
    over = alert_of(good, [past(bad), past(bad, alerted=True)])
    assert over is not None and over["kind"] == "recovered" and over["key"] == first["key"]
    assert alert_of(good, [past(good), past(bad, alerted=True)]) is None


def test_an_alert_that_reached_nobody_is_sent_again() -> None:
    assert alert_of(record(BAD), [past(record(BAD))]) is not None
    assert alert_of(record(row()), [past(record(BAD))]) is None


def test_another_gate_is_another_trouble() -> None:
    other = record(row(KEYS[1], verdict="regression", delta=-5.0))
    found = alert_of(other, [past(record(BAD), alerted=True)])
    assert found is not None and found["key"] != (alert_of(record(BAD), []) or {})["key"]


def test_a_broken_measurement_is_told_as_such_and_unknowns_wake_nobody() -> None:
    broken = alert_of(record(row(verdict="broken", note="no file")), [])
    assert broken is not None and broken["kind"] == "measurement" and "no file" in broken["text"]
    assert alert_of(record(row(verdict="inconclusive")), []) is None
    assert alert_of(record(row(), failures=["controls: disk full"]), []) is not None
    assert alert_of(record(row(verdict="regression", watched=True)), []) is None


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([row()], "tiny is as good as its baseline in all 1 gates."),
        ([row(verdict="improvement", delta=4.0)], "tiny got better: scenes-trained/composition +4 % [+3, +5]."),
        ([row(KEYS[1], verdict="regression", delta=-5.0)], "tiny got worse: scenes-fid/kid +5 [+4, +6]."),
        ([row(), row(KEYS[1], "inconclusive")], "none beyond the margin can be excluded in scenes-fid/kid."),
        ([row(drift=True)], "below its last nights in scenes-trained/composition."),
        ([row(verdict="invalid", note="missed")], "failed their control: scenes-trained/composition. missed"),
    ],
)
def test_the_headline_says_what_happened(rows: list[dict[str, Any]], text: str) -> None:
    assert headline(record(*rows)).endswith(text)


class Hook(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204 if self.path == "/ok" else 500)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    Hook.bodies.clear()
    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_webhook_gets_the_alert_and_a_failure_is_said(hook: str, capsys: pytest.CaptureFixture[str]) -> None:
    alert = alert_of(record(BAD), [])
    assert alert is not None
    assert send(f"{hook}/ok", alert, Path("night/index.html"))
    assert Hook.bodies[0]["text"] == alert["text"] and Hook.bodies[0]["report"] == "night/index.html"
    assert not send(f"{hook}/broken", alert, Path("p"))
    assert not send("http://127.0.0.1:9", alert, Path("p"))
    assert capsys.readouterr().err.count("nobody was told") == 2


def test_junit_counts_what_failed() -> None:
    rows = [row(), BAD, row("a/b", "broken", note='<no "file">'), row("c/d", "inconclusive"), row("e/f", watched=True)]
    (suite,) = ET.fromstring(junit([record(*rows)]))
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    messages = {case.get("name"): next((child.get("message") for child in case), None) for case in suite}
    assert messages["a/b"] == '<no "file">' and messages[KEYS[0]] is not None and messages["e/f"] is None


def test_github_gets_the_summary_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    github_summary("x")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    github_summary("one")
    github_summary("two")
    assert (tmp_path / "s.md").read_text() == "one\ntwo\n"
