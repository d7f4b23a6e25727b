"""The blind page: nobody can tell the sides apart, votes count once, and the win rate is what was voted."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import arena, run
from eval.arena import Arena, Pair, Votes, collect, describe, make_server
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.prompts import Prompt, load_suite
from eval.sources import open_source
from eval.statistics import bootstrap_mean
from eval.store import Store
from tests.eval.test_store import INFO, a_score

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CANDIDATE, BASELINE = 200, 50
"""Grey levels of the pictures of either side."""


@register
class Redness(PerSampleMetric):
    """Mean red: a metric without a network."""

    name = "test-redness"
    direction = "higher"
    unit = ""

    def update(self, samples: Samples) -> None:
        self._add(samples.images[:, 0].mean(axis=(1, 2), dtype=np.float64), samples)

    def compute(self) -> Score:
        values = np.array(self._values)
        return self._score(bootstrap_mean(values, self._clusters), values, {}).check()


def pairs(count: int = 20) -> list[Pair]:
    def flat(level: int) -> np.ndarray:
        return np.full((3, 4, 4), level, dtype=np.uint8)

    return [Pair((f"p{i}", i), f"prompt <b>{i}</b>", flat(CANDIDATE), flat(BASELINE)) for i in range(count)]


def level(url: str) -> int:
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return int(np.array(Image.open(io.BytesIO(data)))[0, 0, 0])


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[Votes]:
    kept = Votes(tmp_path / "votes.sqlite", "run-a", "run-b")
    yield kept
    kept.close()


def vote_all(page: Arena, voter: str, wanted: int | None) -> list[str]:
    """Vote for the side of that grey level wherever it stands, or for neither; the sides where it stood."""
    sides = []
    while "id" in (question := page.ask(voter)):
        side = "left" if level(question["left"]) == wanted else "right"
        page.answer(question["id"], "tie" if wanted is None else side)
        sides.append(side)
    return sides


def test_the_win_rate_follows_the_pictures_and_not_the_sides(votes: Votes) -> None:
    page = Arena(pairs(), votes)
    sides = vote_all(page, "ann", CANDIDATE)
    assert 4 <= sides.count("left") <= 16, "sides are drawn, so that a voter of one side alone tells nothing"
    rate, count = votes.win_rate() or (None, 0)
    assert rate is not None and (rate.value, count, rate.n) == (100.0, 20, 20)
    vote_all(page, "bob", BASELINE)
    vote_all(page, "cid", None)
    rate, count = votes.win_rate() or (None, 0)
    assert rate is not None and (rate.value, count, rate.n) == (50.0, 60, 20)
    assert describe("A", "B", votes) == "A wins 50.0 % [50.0, 50.0] against B: 60 votes on 20 prompts"


def test_voters_see_orders_and_sides_of_their_own_and_a_reload_changes_nothing(votes: Votes) -> None:
    page = Arena(pairs(), votes)
    first, again = page.ask("ann"), page.ask("ann")
    assert (first["prompt"], first["left"]) == (again["prompt"], again["left"]) and first["id"] != again["id"]
    assert len({page.ask(f"voter-{i}")["prompt"] for i in range(12)}) > 3


def test_nothing_that_a_voter_gets_names_a_side(votes: Votes) -> None:
    question = Arena(pairs(), votes).ask("ann")
    assert set(question) == {"answered", "of", "id", "prompt", "left", "right"}
    assert not any(word in json.dumps(question) for word in ("run-a", "run-b", "candidate", "baseline"))


def test_a_question_is_answered_once_and_votes_outlast_the_page(tmp_path: Path) -> None:
    kept = Votes(tmp_path / "v.sqlite", "a", "b")
    page = Arena(pairs(2), kept)
    question = page.ask("ann")
    page.answer(question["id"], "tie")
    with pytest.raises(KeyError):
        page.answer(question["id"], "tie")
    kept.close()
    later = Votes(tmp_path / "v.sqlite", "a", "b")
    assert Arena(pairs(2), later).ask("ann")["answered"] == 1 and len(later.seen("ann")) == 1
    assert later.seen("bob") == set()
    later.close()
    other = Votes(tmp_path / "v.sqlite", "a", "c")
    assert other.win_rate() is None and describe("A", "C", other) == "nobody has voted"
    other.close()


def test_questions_that_nobody_answers_are_forgotten(votes: Votes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_OPEN", 3)
    page = Arena(pairs(), votes)
    oldest, *_, newest = [page.ask(f"v{i}")["id"] for i in range(5)]
    with pytest.raises(KeyError):
        page.answer(oldest, "left")
    page.answer(newest, "left")


@pytest.fixture
def server(votes: Votes) -> Iterator[str]:
    started = make_server(Arena(pairs(3), votes), "127.0.0.1", 0)
    thread = threading.Thread(target=started.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{started.server_port}"
    started.shutdown()
    thread.join()
    started.server_close()


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        ("/vote", b'{"id": "x", "choice": "left"}', "application/json", 409, "answered or forgotten"),
        ("/vote", b'{"id": "x", "choice": "up"}', "application/json", 400, "use one of left, right, tie"),
        ("/question", b'{"voter": ""}', "application/json", 400, "1 to 64 characters"),
        ("/question", b'{"voter": 7}', "application/json", 400, "voter is 7"),
        ("/question", b"[]", "application/json", 400, "no JSON object"),
        ("/question", b"{", "application/json", 400, "Expecting"),
        ("/question", b'{"voter": "ann"}', "text/plain", 400, "not application/json"),
        ("/question", b" " * 5000, "application/json", 400, "at most 4096 bytes"),
        ("/other", b"{}", "application/json", 404, "/other is not here"),
    ],
)
def test_bad_requests_are_told_why(
    server: str, path: str, body: bytes, kind: str, status: int, message: str, votes: Votes
) -> None:
    found, tree = post(server + path, body, kind)
    assert found == status and message in tree["error"]
    assert votes.win_rate() is None


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_takes_clicks_and_keys_and_ends(server: str, votes: Votes) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": 360, "height": 740}).new_page()
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda sent: sent.url.startswith((server, "data:")) or troubles.append(sent.url))
        page.goto(server)
        page.wait_for_selector("#tie:enabled")
        assert "<b>" in page.inner_text("#prompt"), "a prompt is text, never markup"
        body = page.locator("main").bounding_box()
        assert body is not None and body["x"] + body["width"] <= 360
        for number, act in enumerate(
            (
                lambda: page.click("button[data-choice=left]"),
                lambda: page.keyboard.press("2"),
                lambda: page.keyboard.press("0"),
            ),
            start=1,
        ):
            act()
            page.locator("#state", has_text=f"{number} of 3").wait_for()
        assert page.inner_text("#prompt").startswith("That was the last one")
        assert not page.is_visible("#pair") and not troubles
        browser.close()
    rate, count = votes.win_rate() or (None, 0)
    assert rate is not None and count == 3


@pytest.fixture
def three_runs(tmp_path: Path, scene_prompts: Callable[[int], list[Prompt]]) -> Path:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        for label, suite in (("AMD", "scenes-trained"), ("DMD2", "scenes-trained"), ("AMD", "scenes-fid")):
            run_id = store.begin(replace(INFO, label=label, suite=suite))
            store.complete(run_id, scene_prompts(4), [a_score([1.0, 2.0, 3.0, 4.0])])
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["AMD", "DMD3", "--suite", "scenes-trained"], "labelled 'DMD3', nor of that id; did you mean 'DMD2'?"),
        (["AMD", "DMD2", "--suite", "scenes-fid"], "'DMD2' has no complete run of scenes-fid; give --suite scenes-tr"),
        (["x", "y", "--suite", "scenes-canary"], "no complete run of scenes-canary; score one"),
        (["AMD", "AMD", "--suite", "scenes-trained"], "give two different runs"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_clear_line(
    words: list[str], message: str, three_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arena.main([*words, "--store", str(three_runs)]) == 3
    assert message in capsys.readouterr().err


def test_a_store_that_is_not_there_is_named_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.sqlite"
    assert arena.main(["AMD", "DMD2", "--store", str(missing)]) == 3
    assert "none.sqlite is missing" in capsys.readouterr().err and not missing.exists()


def test_votes_and_addresses_that_cannot_be_had_are_named(votes: Votes, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello " * 100)
    with pytest.raises(EvalError, match=r"notes.txt cannot keep votes: .*give another --votes"):
        Votes(tmp_path / "notes.txt", "a", "b")
    with pytest.raises(EvalError, match=r"127.0.0.1:99999 cannot be served: .*--port"):
        make_server(Arena(pairs(1), votes), "127.0.0.1", 99_999)


def test_pairs_are_what_both_runs_drew(tiny_bundle: Path, tmp_path: Path) -> None:
    store, cache = tmp_path / "s.sqlite", tmp_path / "cache"
    suite = load_suite("scenes-canary").model_copy(update={"metrics": {"test-redness": {}}, "batch": 4})
    for steps, samples in ((2, 6), (4, 5)):
        source = open_source(str(tiny_bundle), steps=steps, threads=1)
        run.run(source, suite, store=store, samples=samples, label=f"{steps} steps", cache=cache, quiet=True)
    with Store(store) as kept:
        ours, theirs = (arena.find_run(kept, f"{n} steps", suite.name) for n in (2, 4))
        found = collect(kept, ours, theirs, cache)
        assert len(found) == 5 and found[0].text == kept.texts(ours["id"])[found[0].key]
        assert any((pair.candidate != pair.baseline).any() for pair in found)
        shutil.rmtree(cache)
        with pytest.raises(EvalError, match="share 5 samples and no picture of them"):
            collect(kept, ours, theirs, cache)
    assert arena.main(["2 steps", "nobody", "--store", str(store), "--cache", str(cache)]) == 3
