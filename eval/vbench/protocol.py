"""VBench's sampling protocol: which clips there must be, under which names, from which seeds.

946 entries of VBench_full_info.json (944 different prompts), five clips each, named PROMPT-0.mp4 to PROMPT-4.mp4 in one
folder; an entry is scored in each of its dimensions. Clips of temporal_flickering are static ones: sample 25 of each
prompt, keep the first five that pass VBench's static filter, and name those -0 to -4. Prompts that stand in two entries
share their clips. Seeds are ours: VBench asks only for different ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.prompts import EVALUATION_SEEDS
from eval.vbench.scores import DIMENSIONS, dimension

PER_PROMPT = 5
FIRST_SEED = 7_994_000
LONGEST_SECONDS = 5.0
"""Clips of five seconds and more are VBench-Long's."""
ENTRIES = 946


@dataclass(frozen=True)
class Entry:
    """One entry: its prompt, its dimensions, and what some of them look for (VBench's auxiliary_info)."""

    prompt: str
    dimensions: tuple[str, ...]
    looks_for: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Clip:
    """One clip that there must be."""

    prompt: str
    number: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.prompt}-{self.number}.mp4"


def read_entries(path: Path, expected: int | None = ENTRIES) -> tuple[Entry, ...]:
    """Entries of a file in the form of VBench_full_info.json; expected: how many there must be, None for any number."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(Entry(row["prompt_en"], tuple(row["dimension"]), row.get("auxiliary_info", {})) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{path} is no list of VBench's prompts ({error!r}); give its VBench_full_info.json") from None
    if expected is not None and len(entries) != expected:
        raise EvalError(f"{path} holds {len(entries)} entries and VBench has {expected}; install vbench 0.1.5 again")
    for entry in entries:
        for name in entry.dimensions:
            dimension(name)
        if not entry.prompt or "/" in entry.prompt:
            raise EvalError(f"prompt {entry.prompt!r} cannot be the name of a file; correct {path}")
    return entries


def of_dimensions(entries: Iterable[Entry], names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries that any of the dimensions scores."""
    return tuple(entry for entry in entries if set(entry.dimensions) & set(names))


def clips(entries: Sequence[Entry], names: Sequence[str], per_prompt: int = PER_PROMPT) -> list[Clip]:
    """The clips that the named dimensions score, each once, in order.

    A prompt's seeds come from its place among all entries, so they are the same whichever dimensions are asked for.
    """
    if not 1 <= per_prompt <= PER_PROMPT:
        raise EvalError(f"{per_prompt} clips per prompt are asked for; VBench takes 1 to {PER_PROMPT}")
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(entry.prompt for entry in entries))}
    room = (EVALUATION_SEEDS.stop - FIRST_SEED) // PER_PROMPT
    if len(places) > room:
        raise EvalError(f"{len(places)} prompts have no seeds of their own; give at most {room}")
    wanted = dict.fromkeys(entry.prompt for entry in of_dimensions(entries, names))
    return [
        Clip(prompt, number, FIRST_SEED + PER_PROMPT * places[prompt] + number)
        for prompt in wanted
        for number in range(per_prompt)
    ]


def parse_dimensions(names: Sequence[str] | None) -> tuple[str, ...]:
    """All sixteen unless some are named; raises EvalError for an unknown one."""
    return tuple(dimension(name).name for name in dict.fromkeys(names)) if names else tuple(DIMENSIONS)
