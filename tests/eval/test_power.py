"""A thousand simulated nights: how often the gates cry wolf, and what they find."""

from __future__ import annotations

import pytest

from eval import power
from eval.power import Group, groups_of, simulate
from eval.statistics import wilson


@pytest.fixture(scope="module")
def real() -> list[Group]:
    """The gates and sizes that are shipped."""
    return groups_of(["scenes-sdxl", "digits-sit"])


def test_a_thousand_clean_nights_raise_at_most_one_percent_false_alarms(real: list[Group]) -> None:
    found = simulate(real, nights=1000)
    assert found.alarms / found.nights <= 0.01
    assert found.suspicions / found.nights <= 0.10  # the screening level


def test_a_drop_of_a_seventh_of_a_deviation_is_found_at_the_smallest_suite(real: list[Group]) -> None:
    found = simulate(real, nights=200, shift=0.15)
    assert wilson(found.named, found.nights, level=0.99).high >= 0.85 and found.named / found.nights >= 0.85
    assert found.misnamed / found.nights <= 0.01


def test_binary_scores_keep_both_promises() -> None:
    groups = [Group(1000, 4, "binary")]
    assert simulate(groups, nights=300).alarms <= 3
    assert simulate(groups, nights=100, shift=0.15).named >= 85


def test_without_a_second_panel_and_holm_most_nights_would_alarm(real: list[Group]) -> None:
    """What the procedure is for: 10 gates at 5 % each, judged alone."""
    import numpy as np

    rng = np.random.default_rng(0)
    nights = 60
    alarms = sum(any(e.worse < 0.05 for e in power._panel(real, 0.0, rng)) for _ in range(nights))
    assert alarms / nights > 0.2


def test_the_command_prints_what_the_docs_quote(capsys: pytest.CaptureFixture[str]) -> None:
    assert power.main(["--gates", "digits-sit", "--nights", "20", "--shift", "0.15"]) == 0
    out = capsys.readouterr().out
    assert "3 gates" in out and "false alarms: 0.0 %" in out and "a drop of 0.15 sd found and named: 100.0 %" in out
    assert power.main(["--gates", "nothing"]) == 3
    assert "use one of digits-sit, scenes-sdxl" in capsys.readouterr().err
