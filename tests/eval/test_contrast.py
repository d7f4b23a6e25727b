"""Intervals over seeds and prompts against closed forms and by simulation; the table and the figure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.contrast import Measure, crossed_mean, difference_of, draw, markdown, mean_of, student_t
from eval.statistics import bootstrap_mean


def two_way(rng: np.random.Generator, seeds: int, prompts: int, effects: tuple[float, float, float]) -> np.ndarray:
    """value[s, p] = seed effect + prompt effect + noise, with these standard deviations, mean 0."""
    a, b, e = effects
    noise = e * rng.standard_normal((seeds, prompts))
    return a * rng.standard_normal((seeds, 1)) + b * rng.standard_normal((1, prompts)) + noise


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (40, 2.0211)]
)
def test_students_t_equals_published_quantiles(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, abs=1e-4)
    assert student_t(degrees, 0.5) < student_t(degrees, 0.9) < quantile


def test_standard_error_is_that_of_both_factors() -> None:
    """With effects of seeds and prompts alone the variance of the mean is a²/S + b²/P; here a large table's own."""
    rng = np.random.default_rng(0)
    table = two_way(rng, 30, 50, (1.0, 2.0, 0.0))
    of_seeds, of_prompts = table.mean(1).var(ddof=1) / 30, table.mean(0).var(ddof=1) / 50
    interval = crossed_mean(table)
    assert interval.value == pytest.approx(table.mean()) and interval.n == 30
    assert interval.se == pytest.approx(math.sqrt(of_seeds + of_prompts), rel=0.08)
    half = student_t(29) * interval.se
    assert (interval.low, interval.high) == pytest.approx((interval.value - half, interval.value + half))


@pytest.mark.parametrize("effects", [(1.0, 0.0, 1.0), (0.3, 3.0, 1.0), (0.2, 0.2, 4.0)])
def test_intervals_of_five_seeds_cover(effects: tuple[float, float, float]) -> None:
    """At least 95 % less three standard errors of the simulation; percentiles over seeds alone cover far less."""
    rng, covered, naive, trials = np.random.default_rng(1), 0, 0, 150
    for _ in range(trials):
        table = two_way(rng, 5, 40, effects)
        interval = crossed_mean(table)
        covered += interval.low <= 0 <= interval.high
        resampled = table.mean(1)[rng.integers(5, size=(400, 5))].mean(1)
        naive += np.quantile(resampled, 0.025) <= 0 <= np.quantile(resampled, 0.975)
    assert covered / trials > 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials)
    assert naive < covered


def test_one_seed_leaves_the_prompts_and_one_number_leaves_nothing() -> None:
    row = np.random.default_rng(0).normal(size=(1, 50))
    assert crossed_mean(row) == bootstrap_mean(row[0])
    alone = crossed_mean(np.array([[3.0]]))
    assert alone.value == 3.0 and math.isnan(alone.low)


def test_a_number_per_seed_gets_students_interval() -> None:
    values = np.array([[1.0], [2.0], [4.0], [5.0]])
    interval = crossed_mean(values)
    se = values.std(ddof=1) / 2
    assert interval.se == pytest.approx(se, rel=0.06)
    assert interval.high - interval.value == pytest.approx(student_t(3) * interval.se)


@pytest.fixture
def measure() -> Measure:
    """Seeds differ much more than methods do; the method adds 1."""
    rng = np.random.default_rng(2)
    base = 50 + two_way(rng, 4, 60, (5.0, 3.0, 0.1))
    better = base + 1 + 0.1 * rng.standard_normal(base.shape)
    return Measure(
        "iterations", "accuracy", "%", 1, {"DMD2": dict(enumerate(base)), "AMD": dict(enumerate(better[:3]))}
    )


def test_differences_are_paired_by_seed_and_prompt(measure: Measure) -> None:
    """Over shared seeds only, and far narrower than the difference of two means would be."""
    found = difference_of(measure, "AMD", "DMD2")
    own = mean_of(measure, "AMD")
    assert found is not None and own is not None
    assert found.n == 3 and found.value == pytest.approx(1.0, abs=0.05)
    assert found.low > 0.8 and own.high - own.low > 20 * (found.high - found.low)
    assert difference_of(measure, "DMD2", "DMD2") is not None
    assert difference_of(measure, "DMD2", "none") is None and mean_of(measure, "none") is None


def test_table_names_direction_and_marks_differences_that_are_sure(measure: Measure) -> None:
    unsure = Measure("iterations", "FID", "", -1, {"DMD2": {0: np.array([3.0])}, "AMD": {0: np.array([2.0])}}, True)
    text = markdown([measure, unsure], ["DMD2", "AMD", "missing"])
    assert "### At equal iterations" in text
    assert "| accuracy (%) ↑ | FID ↓ † |" in text
    rows = {line.split("|")[1].strip(): line for line in text.split("minus DMD2")[1].splitlines()}
    assert "**+1.0" in rows["AMD"] and "-1 " in rows["AMD"].replace("-1.0", "-1 ") and "**-1" not in rows["AMD"]
    assert rows["missing"] == "| missing | – | – |"


def test_figure_has_a_panel_per_metric_and_clock(measure: Measure, tmp_path: Path) -> None:
    other = Measure("wall-clock", "accuracy", "%", 1, measure.runs)
    draw([measure], ["DMD2", "AMD"], tmp_path / "one.png")
    draw([measure, measure, other, other], ["DMD2", "AMD"], tmp_path / "four.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "four.png") as four:
        assert four.width > 1.3 * one.width and four.height > 1.3 * one.height
        assert one.convert("RGB").getcolors(100_000) is not None
        drawn = np.asarray(four.convert("RGB")).reshape(-1, 3)
    assert (np.abs(drawn.astype(int) - (0x2E, 0x6F, 0xC8)).sum(1) < 10).sum() > 100  # the intervals' colour
