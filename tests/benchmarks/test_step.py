"""The benchmark of training steps: its statistics and its clock, the methods it makes of a recipe, and a whole run."""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers import Checkout, checkouts
from benchmarks.step import Clock, Row, main, measure, median_interval, print_bar, variant
from distill.bundle import Bundle

ROOT = Path(__file__).parents[2]
DIGITS = "recipes/digits-amd.yaml"


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> itertools.count[float]:
    """Both clocks advance by one second whenever they are read."""
    ticks = itertools.count(0.0)
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    return ticks


@pytest.mark.parametrize(("n", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (20, 6), (50, 18)])
def test_the_interval_of_a_median_has_the_tabulated_ranks(n: int, rank: int | None) -> None:
    """Ranks of 95 % intervals for the median (Conover, Practical Nonparametric Statistics, binomial tables)."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert median_interval(values) == (None if rank is None else (float(rank), float(n + 1 - rank)))


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    spans = [median_interval(rng.exponential(size=11)) for _ in range(2000)]
    covered = np.mean([low <= np.log(2) <= high for low, high in filter(None, spans)])
    assert covered == pytest.approx(1 - 2 * 12 / 2048, abs=0.006)  # P(Binomial(11, ½) < 2) = 12/2048


def test_time_inside_a_part_is_not_in_what_surrounds_it(ticking: itertools.count[float]) -> None:
    clock = Clock()  # reads 0
    clock.phase("student")  # 1 second of rest
    with clock.part("decode"), clock.part("reward"):  # 1 of student, 1 of decode
        next(ticking)  # 2 of reward
    clock.phase("fake")  # 1 of decode, 1 of student
    assert clock.spent == {"rest": 1.0, "student": 2.0, "decode": 2.0, "reward": 2.0}


def test_ratios_are_over_the_first_contender_of_whole_periods(ticking: itertools.count[float]) -> None:
    order: list[tuple[str, int]] = []

    class Worker:
        def __init__(self, name: str, period: int, seconds: int) -> None:
            self.name, self.period, self.seconds = name, period, seconds
            self.spent: dict[str, float] = defaultdict(float)

        def step(self, iteration: int) -> None:
            order.append((self.name, iteration))
            self.spent["fake"] += self.seconds
            for _ in range(self.seconds):
                next(ticking)

    rows = measure({"a": Worker("a", 2, 2), "b": Worker("b", 3, 6)}, 7, say=lambda line: None)
    assert [i for name, i in order if name == "a"] == [i for name, i in order if name == "b"] == list(range(48))
    assert order[:4] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    # Work of 2 and 6 seconds; reading the clocks adds one to the processor's and three to the wall's.
    assert [(row.seconds, row.cpu_seconds) for row in rows] == [(5.0, 3.0), (9.0, 7.0)]
    assert [(row.ratio, row.cpu_ratio) for row in rows] == [(1.0, 1.0), (1.8, round(7 / 3, 4))]
    assert rows[1].cpu_ratio_interval == (rows[1].cpu_ratio, rows[1].cpu_ratio)
    assert rows[1].phases == {"fake": 6.0}


@pytest.mark.parametrize(
    ("interval", "middle", "verdict", "below"),
    [
        ((1.01, 1.149), 1.1, "pass", [True, True, True]),
        ((1.01, 1.15), 1.1, "undecided", [True, True, False]),
        ((1.14, 1.3), 1.2, "undecided", [True, False, False]),
        ((1.15, 1.3), 1.2, "fail", [False, False, False]),
        (None, 1.1, "undecided", [None, True, None]),
    ],
)
def test_a_bar_is_passed_where_the_whole_interval_lies_below_it(
    interval: tuple[float, float] | None,
    middle: float,
    verdict: str,
    below: list[bool | None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of processor time; the ratio of wall-clock, which other work disturbs, decides nothing."""
    first = Row("dmd2", 1.0, 1.0, 1.0, None, 1.0, None, {})
    row = Row("amd", 1.0, 1.0, 9.0, (8.0, 9.0), middle, interval, {})
    assert row.bar == {
        "bar": 1.15,
        "verdict": verdict,
        "below": dict(zip(("low", "middle", "high"), below, strict=True)),
    }
    print_bar([first, row])
    assert f"amd: {verdict} at 1.15 of dmd2's processor time (low " in capsys.readouterr().out


def test_a_method_keeps_the_recipes_own_values(at_root: None) -> None:
    plain, amd = variant(DIGITS, "dmd2"), variant(DIGITS, "amd adaptation.strength=0.3", ["batch_size=16"])
    assert (plain.advantage, plain.adaptation, plain.sharpening) == (None, None, None)
    assert amd.advantage is not None and amd.advantage.sigma_floor == 0.05 and amd.batch_size == 16
    assert amd.adaptation is not None and amd.adaptation.strength == 0.3
    assert plain.fake_per_student == amd.fake_per_student == 5
    tdm = variant(DIGITS, "tdm")
    assert tdm.sub_interval is not None and (tdm.fake_per_student, tdm.sampler) == (1, "deterministic")
    assert tdm.advantage is None and not tdm.step_aware_fake and variant(DIGITS, "tdm-any").step_aware_fake


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        (DIGITS, "dmd3", "there is no method 'dmd3'; use one of dmd2"),
        ("recipes/digits-dmd2.yaml", "amd", "has no advantage.reward, which amd needs"),
        ("recipes/digits-teacher.yaml", "dmd2", "a recipe of task diffusion; give one of task distill"),
    ],
)
def test_what_cannot_be_measured_is_refused(at_root: None, recipe: str, words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant(recipe, words)


def test_a_run_times_every_phase_and_keeps_other_entries(
    at_root: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "step.json", torch.get_num_threads()
    out.write_text('{"another": {}}')
    try:
        settings = ["batch_size=8", "fake_per_student=2", "steps=[1]"]
        assert main([DIGITS, "--methods", "dmd2", "amd", "--set", *settings, "--repeats", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text())
    assert set(results) == {"another", "digits-amd"}
    entry = results["digits-amd"]
    plain, amd = entry["rows"]
    assert (plain["method"], amd["method"], plain["ratio"], plain["cpu_ratio"]) == ("dmd2", "amd", 1.0, 1.0)
    assert set(plain["phases"]) == {"student", "fake"}
    assert set(amd["phases"]) == {"student", "fake", "decode", "reward"}
    assert all(seconds > 0 for row in (plain, amd) for seconds in row["phases"].values())
    assert amd["ratio_interval"] is None and amd["seconds"] > 0
    assert entry["methods"]["amd"]["advantage"]["sigma_floor"] == 0.05 and "advantage" not in entry["methods"]["dmd2"]
    assert amd["bar"]["verdict"] == "undecided" and amd["bar"]["below"]["middle"] == (amd["cpu_ratio"] < 1.15)
    told = capsys.readouterr().out
    assert f"wrote {out}" in told and "amd: undecided at 1.15 of dmd2's processor time" in told


# --- other projects ------------------------------------------------------------------------------------------------


def test_a_checkout_that_is_none_is_refused(tmp_path: Path) -> None:
    for word in ("fastgen", f"other={tmp_path}", f"fastgen={tmp_path}/missing"):
        with pytest.raises(ValueError, match="give fastgen=PATH or dmd2=PATH of a checkout"):
            checkouts([word])


@pytest.mark.parametrize(
    ("name", "recipe", "missing"), [("fastgen", DIGITS, "fastgen"), ("dmd2", "recipes/scenes-amd.yaml", "main")]
)
def test_an_empty_checkout_names_what_it_lacks(
    at_root: None, tmp_path: Path, name: str, recipe: str, missing: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} in .* needs the module '{missing}.*give the root of a checkout"):
        checkouts([f"{name}={tmp_path}"])[0].open(variant(recipe, "dmd2"), tmp_path)


def test_our_recipe_takes_the_plan_of_the_peer(at_root: None, tmp_path: Path) -> None:
    peer, first = Checkout("fastgen", tmp_path), variant(DIGITS, "dmd2")
    ours = variant(DIGITS, "dmd2", peer.plan(first, Bundle.open(first.teacher).manifest.family))
    assert (ours.ttur, ours.steps, ours.ema, ours.fake_warmup, ours.fake_per_student) == ("alternating", (1,), 0, 0, 5)
    assert peer.commit is None
    with pytest.raises(ValueError, match="driven on networks of the sit family, not of sdxl"):
        peer.plan(first, "sdxl")
