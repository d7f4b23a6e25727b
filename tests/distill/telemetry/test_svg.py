"""Charts say what they should: positions, ticks, scales, and histograms over time."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from distill.telemetry import svg
from distill.telemetry.record import Series


def points(text: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(text)
    return [
        [(float(a), float(b)) for a, b in (p.split(",") for p in line.attrib["points"].split())]
        for line in root.iter("polyline")
    ]


def test_a_line_rises_with_its_values() -> None:
    ((a, b, c),) = points(svg.lines([("x", Series((0, 50, 100), (1.0, 2.0, 3.0)))], span=(0, 100)))
    assert a[0] == svg.LEFT and c[0] == svg.WIDTH - svg.RIGHT and b[0] == pytest.approx((a[0] + c[0]) / 2)
    assert a[1] > b[1] > c[1] >= svg.TOP and b[1] == pytest.approx((a[1] + c[1]) / 2, abs=0.1)


def test_values_over_decades_are_drawn_on_a_log_axis() -> None:
    text = svg.lines([("x", Series((0, 1, 2), (1.0, 10.0, 100.0)))], span=(0, 2))
    ((a, b, c),) = points(text)
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)
    assert all(f">{n}<" in text for n in ("1", "10", "100"))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_a_constant_has_an_axis(value: float) -> None:
    ((_, b),) = points(svg.lines([("x", Series((1, 2), (value, value)))], span=(1, 2)))
    assert svg.TOP < b[1] < svg.HEIGHT - svg.BOTTOM


def test_limits_are_shown_where_they_are_near() -> None:
    series = [("x", Series((1, 2), (0.4, 0.6)))]
    assert 'class="bad"' in svg.lines(series, limits=[(0.5, "bad")], span=(1, 2))
    assert 'class="bad"' not in svg.lines(series, limits=[(50.0, "bad")], span=(1, 2))


def test_what_is_not_finite_or_empty_is_not_drawn() -> None:
    assert svg.lines([("x", Series((), ()))], span=(0, 1)) == "" == svg.heat([], "w", span=(0, 1))
    ((a, b),) = points(svg.lines([("x", Series((1, 2, 3), (1.0, float("inf"), 2.0)))], span=(1, 3)))
    assert a[0] < b[0]


def test_names_cannot_break_the_page() -> None:
    ElementTree.fromstring(svg.lines([("<b>&", Series((1, 2), (1.0, 2.0)))], span=(1, 2)))


def test_rebinning_keeps_the_samples() -> None:
    rows = svg.rebin([0.0, 1.0, [1, 0, 0, 3]], 0.0, 2.0)
    assert rows.sum() == pytest.approx(1.0) and rows[: svg.ROWS // 8].sum() == pytest.approx(0.25)
    assert rows[svg.ROWS // 2 :].sum() == 0.0
    single = svg.rebin([0.5, 0.5, [7]], 0.0, 1.0)
    assert single[svg.ROWS // 2] == 1.0 and single.sum() == 1.0
    assert svg.rebin([1.0, 1.0, [7]], 0.0, 1.0)[-1] == 1.0


def test_a_histogram_over_time_is_dark_where_the_samples_are() -> None:
    text = svg.heat([(10, [0.0, 1.0, [9, 1]]), (20, [0.0, 1.0, [1, 9]])], "w", span=(10, 20))
    ElementTree.fromstring(text)
    encoded = re.search(r"base64,([^\"]+)", text)
    assert encoded
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))[..., 3]
    assert alpha.shape == (svg.ROWS, 2)
    assert alpha[-1, 0] > alpha[0, 0] and alpha[0, 1] > alpha[-1, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.12345, "0.123"), (-2.5, "−2.5"), (1234.5, "1,234"), (0.5, "0.5"), (2e-5, "2e-5"),
        (1.5e7, "1.5e7"), (300.0, "300"), (float("nan"), "not finite"), (99.96, "100"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert svg.number(value) == text
