"""The sum of a slow drift: its closed form, its false alarms and power, and what counts as a point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval.drift import LIMIT, SLACK, Drift, cusum, drift_of, recursive_residuals
from tests.eval.nights import KEYS, record, row

PROMPTS = 800
"""Of the smallest shipped suite, as eval.power has it."""


def test_residuals_of_a_line_and_of_a_constant_have_their_closed_form() -> None:
    """x_i = d·i lies d·(i + 1)/2 above the mean of those before, of which i nights have been seen."""
    line = recursive_residuals([0.3 * i for i in range(6)], [2.0] * 6)
    assert line == pytest.approx([0.3 * (i + 1) / 2 / (2 * np.sqrt(1 + 1 / i)) for i in range(1, 6)])
    assert recursive_residuals([-1.7] * 5, [0.1] * 5) == pytest.approx([0] * 4)


def test_the_sum_grows_by_falls_beyond_the_slack_and_never_below_zero() -> None:
    assert cusum([-2.0, -2.0, 1.0, 9.0, -0.5, -1.0]) == pytest.approx([1.5, 3.0, 1.5, 0.0, 0.0, 0.5])
    assert cusum([-SLACK] * 99)[-1] == 0


def raised(changes: np.ndarray) -> float:
    """Share of rows (repetitions, nights) of standard error 1 in which the sum ever passes the limit."""
    sums = (cusum(recursive_residuals(line, [1.0] * len(line))) for line in changes.tolist())
    return float(np.mean([max(line) > LIMIT for line in sums]))


def test_false_alarms_in_sixty_nights_are_few_however_lucky_the_panel_was() -> None:
    rng = np.random.default_rng(0)
    luck = 5 * rng.normal(size=(4000, 1))
    assert 0.02 < raised(luck + rng.normal(size=(4000, 60))) < 0.05


@pytest.mark.parametrize("in_errors", [0.05 * np.sqrt(PROMPTS), 0.2])
def test_a_slow_fall_is_seen_within_twenty_nights(in_errors: float) -> None:
    """0.05 of a prompt's paired deviation a night, 1.4 standard errors at 800 prompts; and 0.2 errors, as at 16."""
    rng = np.random.default_rng(1)
    assert raised(rng.normal(size=(500, 20)) - in_errors * np.arange(20)) > 0.9
    assert raised(rng.normal(size=(500, 20)) + in_errors * np.arange(20)) < 0.02


def stored(changes: list[float], digests: str, **more: Any) -> list[dict[str, Any]]:
    """Nights of the store, one per change and weights."""
    found = []
    for day, (change, digest) in enumerate(zip(changes, digests, strict=True), start=1):
        made = record(row(KEYS[0], delta=change), night=f"2026-11-{day:02}", environment={"digest": digest}, **more)
        found.append({"night": made["night"], "bundle": made["bundle"], "outcome": made})
    return found


def test_the_same_weights_are_one_point_and_the_start_of_the_fall_is_named() -> None:
    nights = stored([0.0, 0.0, 0.0, -1.0, -1.0, -2.0], "aaabbc")
    found = drift_of(KEYS[0], nights[::-1])
    expected = cusum(recursive_residuals([0.0, -1.0, -2.0], [0.5] * 3))[-1]
    assert found == Drift(pytest.approx(expected), 3, "2026-11-05") and found.raised is (expected > LIMIT)
    assert drift_of(KEYS[0], stored([0.0, 1.0], "ab")) == Drift(0.0, 2, None)


def test_nights_of_an_earlier_baseline_and_gates_without_a_change_do_not_count() -> None:
    nights = stored([-9.0, 0.0, 0.0], "abc")
    nights[0]["outcome"]["baseline"]["pinned"] = "2026-10-01T00:00:00"
    assert drift_of(KEYS[0], nights) == Drift(0.0, 2, None)
    nights[1]["outcome"]["rows"][0].pop("change")
    assert drift_of(KEYS[0], nights) is None
    assert drift_of(KEYS[1], nights) is None and drift_of(KEYS[0], []) is None
