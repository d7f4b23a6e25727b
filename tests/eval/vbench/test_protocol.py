"""Which clips VBench's protocol asks for, from prompts in the form of its own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.errors import EvalError
from eval.vbench.protocol import Entry, clips, of_dimensions, parse_dimensions, read_entries
from eval.vbench.scores import DIMENSIONS

ROWS: list[dict[str, Any]] = [
    {"prompt_en": "a red cube", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a cube, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "a cube, oil painting", "dimension": ["overall_consistency", "aesthetic_quality"]},
    {"prompt_en": "A red cube", "dimension": ["temporal_flickering"]},
]


@pytest.fixture
def entries(tmp_path: Path) -> tuple[Entry, ...]:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(ROWS))
    return read_entries(path, None)


def test_prompts_in_two_entries_share_their_clips_and_case_tells_prompts_apart(entries: tuple[Entry, ...]) -> None:
    wanted = clips(entries, parse_dimensions(None))
    files = [clip.file for clip in wanted]
    assert files[:6] == [
        *(f"a red cube-{i}.mp4" for i in range(5)),
        "a cube, oil painting-0.mp4",
    ]
    assert len(wanted) == 3 * 5 and len({clip.seed for clip in wanted}) == 15


def test_a_prompt_keeps_its_seeds_whichever_dimensions_are_asked_for(entries: tuple[Entry, ...]) -> None:
    everything = {clip.file: clip.seed for clip in clips(entries, parse_dimensions(None))}
    for names in (["temporal_flickering"], ["aesthetic_quality", "color"]):
        some = clips(entries, names, per_prompt=2)
        assert some and all(everything[clip.file] == clip.seed for clip in some)
    assert [entry.prompt for entry in of_dimensions(entries, ["temporal_flickering"])] == ["A red cube"]


def test_what_entries_look_for_is_kept(entries: tuple[Entry, ...]) -> None:
    assert entries[0].looks_for == {"color": {"color": "red"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "no list of VBench's prompts"),
        ('[{"prompt": "x"}]', "no list of VBench's prompts"),
        ('[{"prompt_en": "x", "dimension": ["colour"]}]', "did you mean 'color'"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "cannot be the name of a file"),
    ],
)
def test_faulty_prompts_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text(text)
    with pytest.raises(EvalError, match=message):
        read_entries(path, None)


def test_another_number_of_entries_than_vbenchs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(EvalError, match="holds 4 entries and VBench has 946"):
        read_entries(path)


def test_more_than_five_clips_per_prompt_or_unknown_dimensions_are_refused(entries: tuple[Entry, ...]) -> None:
    with pytest.raises(EvalError, match="VBench takes 1 to 5"):
        clips(entries, ["color"], per_prompt=6)
    with pytest.raises(EvalError, match="did you mean"):
        parse_dimensions(["colors"])
    assert parse_dimensions(None) == tuple(DIMENSIONS) and parse_dimensions(["color", "color"]) == ("color",)
