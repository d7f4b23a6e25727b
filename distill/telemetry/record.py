"""A run's folder read back: log lines, histograms, previews, recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ReportError(ValueError):
    """A folder that holds no run; the message says what is missing."""


@dataclass(frozen=True)
class Series:
    """Values over iterations."""

    x: tuple[int, ...]
    y: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Record:
    """What a run has written so far."""

    name: str
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    previews: list[tuple[int, Path]] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        """How far the log reaches."""
        return int(self.lines[-1]["iteration"])

    def series(self, name: str) -> Series:
        """The finite values of a number; empty where it was never logged."""
        found = [(int(line["iteration"]), line[name]) for line in self.lines if line.get(name) is not None]
        return Series(tuple(x for x, _ in found), tuple(float(y) for _, y in found))

    def histograms(self, name: str) -> list[tuple[int, list[Any]]]:
        """(iteration, [least, greatest, counts]) of each interval that has one."""
        found = [(int(line["iteration"]), line.get("histograms", {}).get(name)) for line in self.lines]
        return [(iteration, histogram) for iteration, histogram in found if histogram]

    def names(self, prefix: str) -> list[str]:
        """Names of numbers with a prefix, in the order of their first appearance."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix)))

    def total(self, name: str) -> float:
        return sum(self.series(name).y)


def load(folder: Path) -> Record:
    """Read runs/NAME. Raises ReportError."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ReportError(f"{folder} holds no log.jsonl; give the folder of a run, such as runs/scenes-amd")
    lines = timeline([json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")])
    if not lines:
        raise ReportError(f"{path} has no line yet; wait for the first interval (log_every) of the run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) if (folder / "recipe.yaml").is_file() else {}
    previews = sorted((int(p.stem), p) for p in (folder / "previews").glob("*.png") if p.stem.isdigit())
    return Record(recipe.get("name", folder.resolve().name), recipe, lines, previews)


def timeline(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the run as it stands: what a resume from an older checkpoint did again replaces what it did first."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["iteration"] >= line["iteration"]:
            kept.pop()
        kept.append(line)
    return kept
