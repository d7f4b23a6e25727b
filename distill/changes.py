"""What a recipe changes in the run that it resumes: most of it is told, and another method is another stage.

A section that appears or disappears (a GAN, adaptation, adapters) makes another stage of training, which starts from
this run's weights under a name of its own and not in the middle of this run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SILENT = ("log_every", "preview_every", "save_every", "keep_checkpoints", "output", "parallel", "telemetry")
"""Keys that decide what is kept and where a run lies, never what it learns."""


@dataclass(frozen=True)
class Change:
    """One key, dotted, with its values before and after."""

    key: str
    before: Any
    after: Any

    @property
    def of_stage(self) -> bool:
        """Whether a whole section of the recipe came or went."""
        present = self.after if self.before is None else self.before
        return (self.before is None) != (self.after is None) and "." not in self.key and isinstance(present, Mapping)

    def __str__(self) -> str:
        return f"{self.key} {self.before!r} → {self.after!r}"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What differs between two recipes as trees of plain values; keys that only one of them knows are not compared."""
    return [change for change in _differences(before, after, "") if change.key.partition(".")[0] not in SILENT]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key in (key for key in before if key in after):
        old, new = before[key], after[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() & new.keys():
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield Change(prefix + key, old, new)
