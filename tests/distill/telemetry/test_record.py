"""A run's folder is read as it stands, also while it grows and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.telemetry.record import ReportError, Series, load, timeline


def written(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_numbers_are_series_without_their_gaps(tmp_path: Path) -> None:
    record = load(
        written(tmp_path, [{"iteration": 1, "a": 2.0}, {"iteration": 2, "a": None}, {"iteration": 3, "a": 4}])
    )
    assert record.series("a") == Series((1, 3), (2.0, 4.0)) and record.total("a") == 6.0
    assert len(record.series("b")) == 0 and record.iterations == 3
    assert record.name == tmp_path.name and record.recipe == {}


def test_histograms_recipe_and_previews_are_found(tmp_path: Path) -> None:
    written(tmp_path, [{"iteration": 5, "histograms": {"w": [0, 1, [3]]}, "forwards/a": 1, "forwards/b": 2}])
    (tmp_path / "recipe.yaml").write_text("name: some\niterations: 9\n")
    (tmp_path / "previews").mkdir()
    for name in ("0000010.png", "0000005.png", "notes.png"):
        (tmp_path / "previews" / name).touch()
    record = load(tmp_path)
    assert record.name == "some" and record.histograms("w") == [(5, [0, 1, [3]])]
    assert record.names("forwards/") == ["forwards/a", "forwards/b"]
    assert [n for n, _ in record.previews] == [5, 10]


def test_what_a_resume_did_again_replaces_what_was_done_first() -> None:
    lines = [{"iteration": n, "try": t} for n, t in ((10, 1), (20, 1), (30, 1), (20, 2), (30, 2))]
    assert [(line["iteration"], line["try"]) for line in timeline(lines)] == [(10, 1), (20, 2), (30, 2)]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    assert load(written(tmp_path, [{"iteration": 1}], tail='{"iteration": 2, "a')).iterations == 1


@pytest.mark.parametrize(
    ("lines", "message"), [(None, "holds no log.jsonl; give the folder of a run"), ([], "has no line yet; wait for")]
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, lines: list[Any] | None, message: str) -> None:
    if lines is not None:
        written(tmp_path, lines)
    with pytest.raises(ReportError, match=message):
        load(tmp_path)
