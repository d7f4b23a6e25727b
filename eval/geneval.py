"""GenEval's rules (Ghosh et al., arXiv 2310.11513; evaluation/evaluate_images.py of djghosh13/geneval): is what the
prompt asks for among what a detector found? Boxes, colours and numbers only; no network.

A prompt's tags say what must be there (``include``: class, count, and a colour or a position relative to an earlier
entry) and what must not (``exclude``: class, from how many on). All of it must hold. The score of a model is the mean
over pictures of each of the six tasks, and the overall score the mean of the six.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD, MOST, REACH = 0.3, 0.9, 16, 0.1
"""Confidence that a thing needs, and needs to be counted; things per class; share of both sizes that is no offset."""


@dataclass(frozen=True)
class Found:
    """One detected thing: x0, y0, x1, y1 in pixels, y downwards; its confidence; its pixels (H, W) bool if known."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


Colours = Callable[[Sequence[Found], str], Sequence[str]]
"""The colour of each of some things of one class."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for. include, exclude: as in GenEval's evaluation_metadata.jsonl."""

    prompt: str
    task: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = ()


def read_wanted(path: Path) -> dict[str, Wanted]:
    """What prompts ask for, by prompt, from GenEval's evaluation_metadata.jsonl. Raises EvalError."""
    if not path.is_file():
        raise EvalError(f"{path} is missing; put GenEval's prompts/evaluation_metadata.jsonl there")
    found: dict[str, Wanted] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            wanted = Wanted(row["prompt"], row["tag"], tuple(row["include"]), tuple(row.get("exclude", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise EvalError(f"{path}:{number} is no prompt of GenEval ({error!r}); give its own file") from None
        if wanted.task not in TASKS:
            raise EvalError(f"{path}:{number} has task {wanted.task!r}; GenEval's are {', '.join(TASKS)}")
        if found.setdefault(wanted.prompt, wanted) != wanted:
            raise EvalError(f"{path}:{number} asks for something else under a prompt of before; keep one of the two")
    return found


def confident(found: Mapping[str, Sequence[Found]], task: str) -> dict[str, list[Found]]:
    """The things by class that count for a task, surest first."""
    least = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    kept = {
        name: sorted((thing for thing in things if thing.score > least), key=lambda thing: -thing.score)[:MOST]
        for name, things in found.items()
    }
    return {name: things for name, things in kept.items() if things}


def is_right(found: Mapping[str, Sequence[Found]], wanted: Wanted, colours: Colours) -> bool:
    """Whether a picture shows what is wanted. Colours and places are asked of the surest things only."""
    sure = confident(found, wanted.task)
    groups: list[list[Found] | None] = []
    for clause in wanted.include:
        things = sure.get(clause["class"], [])[: clause["count"]]
        groups.append(things if _holds(things, clause, groups, colours) else None)
    unwanted = any(len(sure.get(clause["class"], [])) >= clause["count"] for clause in wanted.exclude)
    return None not in groups and not unwanted


def _holds(
    things: Sequence[Found], clause: Mapping[str, Any], groups: Sequence[list[Found] | None], colours: Colours
) -> bool:
    if len(things) < clause["count"]:
        return False
    if "color" in clause and list(colours(things, clause["class"])).count(clause["color"]) < clause["count"]:
        return False
    if "position" not in clause:
        return True
    place, target = clause["position"]
    others = groups[target]
    return others is not None and all(place in places(thing, other) for thing in things for other in others)


def places(a: Found, b: Found) -> set[str]:
    """Where a stands of b: its centre's offset, less REACH of both sizes, is at least half of the whole offset."""
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    reach = [REACH * (abs(a.box[i + 2] - a.box[i]) + abs(b.box[i + 2] - b.box[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - r, 0.0), o) for o, r in zip(offset, reach, strict=True)]
    if max(abs(part) for part in beyond) < 1e-3:
        return set()
    dx, dy = (part / math.hypot(*offset) for part in beyond)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in named.items() if true}


def by_task(right: Sequence[bool], tasks: Sequence[str]) -> dict[str, float]:
    """The share of right pictures of each task that occurs, and their mean as ``overall`` where all six do."""
    shares = {
        task: float(np.mean([r for r, t in zip(right, tasks, strict=True) if t == task]))
        for task in TASKS
        if task in tasks
    }
    return shares | ({"overall": sum(shares.values()) / len(TASKS)} if len(shares) == len(TASKS) else {})
