"""docs/objectives.md says of equal wall-clock what comparisons/results holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.trials import load_comparison

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "comparisons/results/digits-equal-time.json").read_text())
COLUMNS = ("fid", "precision", "recall", "digit-accuracy", "reward")
NUMBER = re.compile(r"[−+-]?\d+(?:\.\d+)?")


def page_row(steps: str, variant: str) -> list[str]:
    """The cells of a variant in the table of a number of steps."""
    _, _, rest = (ROOT / "docs/objectives.md").read_text(encoding="utf-8").partition(f"| {steps} | FID")
    line = next(line for line in rest.splitlines() if line.startswith(f"| {variant} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def stored(steps: str, metric: str) -> dict[str, Any]:
    title = f"{metric} (digits-objectives, {steps})"
    variants: dict[str, Any] = next(m for m in STORED["measures"] if m["title"] == title)["variants"]
    return variants


@pytest.mark.parametrize("steps", ["4 steps", "1 step"])
@pytest.mark.parametrize("variant", STORED["comparison"]["variants"])
def test_a_row_has_the_stored_numbers(steps: str, variant: str) -> None:
    control = next(iter(STORED["comparison"]["variants"]))
    for metric, cell in zip(COLUMNS, page_row(steps, variant), strict=True):
        told = stored(steps, metric)[variant]["mean" if variant == control else "difference"]
        numbers = NUMBER.findall(cell)
        places = len(numbers[0].partition(".")[2])
        expected = (told["value"], told["low"], told["high"])
        assert [float(n.replace("−", "-")) for n in numbers] == pytest.approx(expected, abs=0.51 * 10**-places), metric
        sure = variant != control and (told["low"] > 0 or told["high"] < 0)
        assert cell.startswith("**") == sure, metric


def test_what_is_stored_is_what_the_comparison_asks_for() -> None:
    asked = load_comparison(ROOT / "comparisons/digits-equal-time.yaml")
    assert STORED["comparison"] == asked.model_dump(mode="json") and STORED["failures"] == []
    assert len(STORED["runs"]) == len(asked.variants) * len(asked.seeds)
