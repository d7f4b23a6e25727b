"""docs/metrics.md says of every metric what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from eval.metrics import registered
from eval.metrics.base import _FACTORIES

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
INTERVALS = {"bootstrap", "Wilson", "influence", "order"}


def rows() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def test_every_metric_stands_there_once_in_order_with_its_direction_unit_and_smallest_n() -> None:
    found = rows()
    ours = [name for name in registered() if not name.startswith("test-")]
    assert list(found) == ours
    for name, (arrow, unit, smallest, interval, definition) in found.items():
        metric = _FACTORIES[name]
        expected = ("↑" if metric.direction == "higher" else "↓", metric.unit, f"{metric.smallest_n:,}")  # type: ignore[attr-defined]
        assert (arrow, unit, smallest) == expected, name
        assert interval in INTERVALS and len(definition) > 20, name
