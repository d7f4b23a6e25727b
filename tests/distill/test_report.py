"""The page of a run, as a file and in a headless Chromium on a phone and a desktop."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from distill.report import _spread, cost, data_uri, main
from distill.telemetry.record import load
from distill.telemetry.sink import Sink, Total

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"phone": (360, 740), "desktop": (1280, 860)}


def a_run(folder: Path, *, hacked: bool = False) -> Path:
    """A run's folder as the trainer writes it, of 12 intervals; hacked: held-out rewards do not follow."""
    sink, rng = Sink(folder, 0), torch.Generator().manual_seed(0)
    for i in range(1, 13):
        low = 0.1 * i
        sink.add(
            {
                "reward": [-1.0 / i], "heldout/judge": [-1.0], "reward_gap": [0.2 * i if hacked else 0.02],
                "reward_not_finite": [0.0], "student/loss": [0.5], "student/grad_norm": [1.0], "fake_error": [0.3],
                "fake/grad_norm": [0.7], "dm_norm": [1.0], "ca_norm": [1.5], "dm_ca_cos": [-0.2], "w_ess": [0.7],
                "fake_error/t0-0.2": [0.6], "fake_error/t0.8-1": [0.1], "advantage_clipped": [0.4],
                "w": [torch.rand(32, generator=rng) + low], "alpha": [1 + 0.1 * torch.randn(32, generator=rng)],
                "zone/share": [0.0], "zone/lost": [0.1], "zone/flat": [0.3], "probe/diversity": [1.0],
                "probe/fake_residual": [1.0], "probe/residual": [1.1], "probe/reward_lead": [0.0],
                "forwards/student": [Total(640)], "forwards/teacher": [Total(1280)],
                "cpu_seconds/student": [Total(2.5)],
            }
        )  # fmt: skip
        sink.flush(10 * i, 8)
        sink.picture(10 * i, torch.randint(0, 255, (16, 1, 8, 8), generator=rng, dtype=torch.uint8))
    sink.close()
    recipe = {"name": "some<run>", "iterations": 240, "student": {"clip": 10.0}, "fake": {"clip": 10.0}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_run(tmp_path_factory.mktemp("hacked"), hacked=True)
    assert main([str(folder)]) == 0
    return folder / "report.html"


def test_the_verdict_comes_first_and_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(a_run(tmp_path)), "--out", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert "some<run>: Healthy: no rule objects" in told and f"wrote {tmp_path / 'page.html'}" in told
    page = (tmp_path / "page.html").read_text()
    assert page.index("Healthy: no rule objects") < page.index("<h2>Rules") < page.index("<h2>Previews over time")
    assert "some&lt;run&gt;" in page and "some<run>" not in page
    assert "120 of 240 iterations" in page


def test_a_page_shows_everything_that_was_logged(report: Path) -> None:
    page = report.read_text()
    for title in ("Forbidden zone", "Gap of rewards", "Displacements", "Angle", "Gradient norms", "Held-out rewards"):
        assert f"<h3>{title}</h3>" in page
    assert "Fake score&#x27;s error by noise level" in page and "Escapes" not in page  # nothing to show
    assert page.count("data:image/png") == 10 + 2  # previews and histograms
    assert page.index("iteration 10<") < page.index("iteration 120<")
    table = page[page.index("<table>") : page.index("</table>")]
    assert "<td>teacher</td><td>15,360</td><td>128</td><td></td><td></td>" in table
    assert "<td>student</td><td>7,680</td><td>64</td><td>30</td>" in table
    assert "iterations: 240" in page


def test_the_cost_of_a_gpu_run_is_its_gpus_time(tmp_path: Path) -> None:
    """The host's seconds stand beside it in the log and say nothing of the GPU."""
    sink = Sink(tmp_path, 0)
    for i in (1, 2):
        sink.add(
            {
                "forwards/student": [Total(640)], "gpu_seconds/student": [Total(6.0)],
                "gpu_seconds/fake": [Total(3.0)], "gpu_seconds": [Total(10.0)], "cpu_seconds/student": [Total(777.0)],
            }
        )  # fmt: skip
        sink.flush(10 * i, 8)
    sink.close()
    table = cost(load(tmp_path))
    assert "<th>GPU-seconds</th>" in table and "Whole run: 20 GPU-seconds in" in table
    assert "<td>student</td><td>1,280</td><td>64</td><td>12</td><td>60.0%</td>" in table
    assert "<td>fake</td><td></td><td></td><td>6</td><td>30.0%</td>" in table
    assert "<td>2</td><td>10.0%</td>" in table and "777" not in table and "CPU" not in table


def test_a_page_loads_nothing_from_elsewhere(report: Path) -> None:
    page = report.read_text()
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)


def test_a_folder_without_a_run_is_refused_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no log.jsonl; give the folder of a run" in capsys.readouterr().err


def test_a_run_of_another_task_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink(tmp_path, 0)
    sink.add({"teacher/loss": [0.5], "x": [math.nan]})
    sink.flush(1, 1)
    sink.close()
    assert main([str(tmp_path)]) == 0
    assert "Watch it: numbers that are not finite" in capsys.readouterr().out


def test_previews_are_spread_over_the_run() -> None:
    assert [round(i) for i in _spread(5, 10)] == [0, 1, 2, 3, 4] and list(_spread(0, 10)) == [] and _spread(1, 3) == [0]
    assert [round(i) for i in _spread(100, 4)] == [0, 33, 66, 99]


def test_large_previews_become_smaller(report: Path) -> None:
    path = report.parent / "previews" / "0000010.png"
    assert data_uri(path).startswith("data:image/png;") and data_uri(path, largest=10).startswith("data:image/webp;")


# --- in a browser --------------------------------------------------------------------------------------------------

browsers = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@browsers
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_readable_in_a_browser(report: Path, browser: object, width: str, scheme: str) -> None:
    """Nothing wider than the screen, no error, no other host, the verdict on the first screen, charts drawn."""
    w, h = WIDTHS[width]
    context = browser.new_context(viewport={"width": w, "height": h}, color_scheme=scheme)  # type: ignore[attr-defined]
    context.set_default_timeout(60_000)
    page, troubles = context.new_page(), list[str]()
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.on("request", lambda sent: sent.url.startswith(("file:", "data:")) or troubles.append(sent.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= w
    box = page.locator(".verdict").bounding_box()
    assert box["y"] + box["height"] < h
    assert "Unhealthy: reward hacking" in page.locator(".verdict").inner_text()
    first = page.locator(".card").first
    assert "bad" in first.inner_text() and "held-out" in first.inner_text()
    charts = page.locator("figure svg")
    assert charts.count() >= 12
    sizes = charts.evaluate_all("all => all.map(one => [one.clientWidth, one.clientHeight])")
    assert all(wide > 200 and high > 100 for wide, high in sizes)
    widths = page.locator("figure img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(widths) == 10 and all(wide == 8 * 8 + 7 for wide in widths), "8 pictures and the lines between them"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert not troubles
    context.close()
