"""The report: verdict first, missing and late nights, hostile text, pictures, and a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import report
from eval.metrics.base import Score
from eval.prompts import Prompt
from eval.report import calendar, markdown, render
from eval.sources import generate
from eval.statistics import bootstrap_mean
from eval.store import Store
from tests.eval.nights import KEYS, record, row
from tests.eval.test_store import INFO

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '<script>alert("x")</script> | a "red" cube'


class Painter:
    """A source of flat pictures whose brightness is the seed times a factor."""

    name = "painter"

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.about: dict[str, Any] = {}
        self.identity: dict[str, Any] | None = {"digest": str(factor)}

    def make(self, prompts: Any) -> np.ndarray:
        return np.stack([np.full((3, 16, 16), (self.factor * prompt.seed) % 256, np.uint8) for prompt in prompts])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        yield opened


def scored(store: Store, cache: Path, factor: int, values: list[float]) -> str:
    """A run of 100 samples, over two chunks of the cache, whose pictures are kept."""
    source = Painter(factor)
    prompts = [Prompt(f"p{i}", HOSTILE if i == 7 else f"a cube {i}", i) for i in range(100)]
    list(generate(source, prompts, cache=cache))
    array = np.array(values)
    score = Score("composition", bootstrap_mean(array), 100, "higher", "%", 1, {}, array)
    info = replace(INFO, expected=100, source={"name": "x", "identity": source.identity, "about": {}})
    run = store.begin(info)
    store.complete(run, prompts, [score])
    return run


def night_with_pictures(store: Store, cache: Path) -> dict[str, Any]:
    base, worse = [50.0 + i / 10 for i in range(100)], [50.0 + i / 10 - 20 * (i in (7, 80)) for i in range(100)]
    runs = [scored(store, cache, factor, values) for factor, values in ((2, worse), (1, base))]
    changed = row(verdict="regression", delta=-5.0, worst=[[["p7", 7], -20.0], [["p80", 80], -20.0]], best=[])
    made = record(changed, row(KEYS[1]), runs={"scenes-trained": runs[0]})
    made["baseline"]["runs"] = {"scenes-trained": runs[1]}
    return made


def keep(store: Store, made: dict[str, Any]) -> None:
    store.keep_night(made["night"], made["bundle"], made["started"], made["verdict"], made)


def test_missing_and_late_nights_show_and_the_time_before_the_first_does_not(store: Store) -> None:
    for day, started in (("16", "2026-11-16T02:00"), ("18", "2026-11-18T06:30"), ("20", "2026-11-21T02:00")):
        keep(store, record(row(), night=f"2026-11-{day}", started=started))
    found = {
        day["night"][-2:]: (day["verdict"], bool(day["late"]))
        for day in calendar(store.nights(), "2026-11-20", "04:00")
    }
    assert found == {
        "16": ("equivalent", False), "17": ("missing", False), "18": ("equivalent", True), "19": ("missing", False),
        "20": ("equivalent", True),
    }  # fmt: skip
    text = markdown(store, [store.nights()[0]["outcome"]])
    assert "night 2026-11-17: missing" in text and "night 2026-11-18: late" in text


def test_the_page_shows_old_beside_new_and_escapes_strangers_text(store: Store, tmp_path: Path) -> None:
    made = night_with_pictures(store, tmp_path / "cache")
    keep(store, made)
    page = render(store, [made], cache=tmp_path / "cache")
    assert "<script>alert" not in page and "&lt;script&gt;alert(&#34;x&#34;)" in page
    assert page.index("tiny: regression") < page.index("scores against the baseline")
    assert "better 0 %, equal 98 %, worse 2 %" in page
    pairs = re.findall(r'<img src="(data:image/png;base64,[^"]+)" alt="(\w+): ([^"]+)"', page)
    assert ("tonight", "a cube 80") in [(side, text) for _, side, text in pairs]
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    data = re.search(r'id="records">(.*?)</script>', page, re.DOTALL)
    assert data is not None and json.loads(data[1])[0]["verdict"] == "regression"


def test_what_got_worse_stands_first_with_what_changed_around_it(store: Store, tmp_path: Path) -> None:
    red = row("scenes-fid/kid", "regression", delta=-1.0)
    watched = row("a/reward", "regression", watched=True)
    made = record(row(), watched, red, since="2026-11-18", changes=["digest: 0123 → 4567", "code: abc → def"])
    page = render(store, [made], cache=tmp_path)
    banner = page[page.index('<section class="banner') : page.index("</section>")]
    assert "Since the last good night, 2026-11-18: digest: 0123 → 4567; code: abc → def." in banner
    shown = re.findall(r"<h3>(\S+)", page)
    assert shown == ["scenes-fid/kid", KEYS[0], "a/reward"]
    assert "Since the last" not in render(
        store, [record(row(), since="2026-11-18", changes=["x: 1 → 2"])], cache=tmp_path
    )


def test_pictures_are_those_of_the_samples_and_their_absence_is_said(store: Store, tmp_path: Path) -> None:
    made = night_with_pictures(store, tmp_path / "cache")
    run = store.run(made["runs"]["scenes-trained"])
    found = report.pictures(store, run, tmp_path / "cache", [("p7", 7), ("p80", 80)])
    assert {key: int(image[0, 0, 0]) for key, image in found.items()} == {("p7", 7): 14, ("p80", 80): 160}
    shutil.rmtree(tmp_path / "cache")
    assert "no longer in the cache" in render(store, [made], cache=tmp_path / "cache")


def test_the_summary_is_one_table_a_stranger_cannot_break(store: Store) -> None:
    made = record(row(note="x"), row("a/b", "broken", note=HOSTILE), failures=[HOSTILE], trade_offs=["up and down"])
    text = markdown(store, [made])
    assert "suspicious trade-off: up and down" in text and "&lt;script>" in text and "<script>" not in text
    assert {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")} == {7}


def test_the_command_renders_the_newest_night_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", str(store.path), "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    assert report.main(where) == 3
    assert "has no night" in capsys.readouterr().err
    for night in ("2026-11-19", "2026-11-20"):
        keep(store, record(row(), night=night))
    assert report.main(where) == 0
    assert "night 2026-11-20" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "summary.md").read_text().startswith("## tiny, night 2026-11-20: equivalent")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_on_a_phone_the_verdict_is_on_the_first_screen_and_nothing_overflows(store: Store, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    made = night_with_pictures(store, tmp_path / "cache")
    for day in range(10, 20):
        keep(store, record(row(delta=day / 10), row(KEYS[1]), night=f"2026-11-{day}"))
    keep(store, made)
    page_file = tmp_path / "index.html"
    page_file.write_text(render(store, [made], cache=tmp_path / "cache"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 360, "height": 740})
        opened.set_default_timeout(120_000)
        troubles: list[str] = []
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        opened.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        opened.goto(page_file.as_uri())
        box = opened.locator(".verdict-line").first.bounding_box()
        assert box is not None and box["y"] + box["height"] < 200
        assert opened.locator(".verdict-line").first.inner_text() == "tiny: regression"
        assert opened.evaluate("document.documentElement.scrollWidth") <= 360
        assert opened.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert opened.locator(".history circle").count() >= 12 and not troubles
        opened.screenshot(path=tmp_path / "phone.png", full_page=True)
        browser.close()


def test_a_slow_drift_is_a_line_of_its_gate_and_a_line_of_the_summary_once_it_is_raised(
    store: Store, tmp_path: Path
) -> None:
    def after(nights: int) -> tuple[str, str]:
        for day in range(1, nights + 1):
            made = record(
                row(delta=-0.4 * day), row(KEYS[1]), night=f"2026-11-{day:02}", environment={"digest": str(day)}
            )
            store.keep_night(made["night"], made["bundle"], made["started"], made["verdict"], made)
        return render(store, [made], cache=tmp_path), markdown(store, [made])

    page, summary = after(1)
    assert "slow drift" not in page and "drifting slowly" not in summary
    page, summary = after(12)
    assert f"- drifting slowly: {KEYS[0]}, CUSUM " in summary and f"drifting slowly: {KEYS[1]}" not in summary
    assert "of 5.5 since 2026-11-" in page and "slow drift (CUSUM): 0.0 of 5.5, 12 bundles" in page
