"""VBench's Quality, Semantic and Total against published rows, and what a missing dimension does to them."""

from __future__ import annotations

import pytest

from eval.errors import EvalError
from eval.vbench.scores import DIMENSIONS, dimension, group_score, total_score, worth

ORDER = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
ROUND = (95, 96, 99, 98, 60, 62, 68, 90, 70, 96, 85, 70, 50, 24, 25, 27)
"""Put through the official constants and script."""
VIDEOCRAFTER2 = (
    96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22, 92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23,
)  # fmt: skip
"""The leaderboard's row of VideoCrafter-2.0: Total 80.44, Quality 82.20, Semantic 73.42."""


def raw(percent: tuple[float, ...]) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(ORDER, percent, strict=True)}


def test_the_official_constants_to_the_last_digit() -> None:
    scores = raw(ROUND)
    assert group_score(scores, "quality") == pytest.approx(0.8308098667, abs=5e-11)
    assert group_score(scores, "semantic") == pytest.approx(0.7763136073, abs=5e-11)
    assert total_score(scores) == pytest.approx(0.8199106148, abs=5e-11)


def test_a_row_of_the_leaderboard_to_the_last_digit() -> None:
    scores = raw(VIDEOCRAFTER2)
    quality, semantic, total = group_score(scores, "quality"), group_score(scores, "semantic"), total_score(scores)
    assert quality is not None and semantic is not None and total is not None
    assert (f"{100 * quality:.2f}", f"{100 * semantic:.2f}", f"{100 * total:.2f}") == ("82.20", "73.42", "80.44")


@pytest.mark.parametrize("name", ORDER)
def test_without_a_dimension_there_is_no_total_rather_than_a_low_one(name: str) -> None:
    scores = raw(ROUND)
    del scores[name]
    assert total_score(scores) is None
    assert group_score(scores, dimension(name).group) is None
    other = "semantic" if dimension(name).group == "quality" else "quality"
    assert group_score(scores, other) is not None  # type: ignore[arg-type]


def test_normalising_is_not_clipped() -> None:
    assert dimension("subject_consistency").normalise(0.0) == pytest.approx(-0.171, abs=5e-4)
    assert dimension("motion_smoothness").normalise(1.0) > 1


@pytest.mark.parametrize(
    ("name", "points"),
    [("subject_consistency", 0.144), ("temporal_flickering", 0.332), ("motion_smoothness", 0.422),
     ("dynamic_degree", 0.062), ("scene", 0.027), ("appearance_style", 0.078), ("overall_consistency", 0.061)],
)  # fmt: skip
def test_what_a_dimension_is_worth_is_the_slope_of_total(name: str, points: float) -> None:
    scores = raw(ROUND)
    total = total_score({**scores, name: scores[name] + 0.01})
    before = total_score(scores)
    assert total is not None and before is not None
    assert 100 * (total - before) == pytest.approx(worth(name)) == pytest.approx(points, abs=5e-4)


def test_there_are_seven_and_nine_and_an_unknown_one_is_refused() -> None:
    assert set(DIMENSIONS) == set(ORDER)
    assert [found.group for found in DIMENSIONS.values()].count("quality") == 7
    with pytest.raises(EvalError, match="did you mean 'scene'"):
        dimension("scenes")
