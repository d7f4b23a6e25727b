"""Prompts from text, JSON lines and Parquet, and what is said of files that hold none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from distill.config import FileData
from distill.data.errors import DataError
from distill.data.prompts import check_files, read_prompts


def test_one_prompt_per_line_without_white_space_and_mark(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red cube \n\n  zwei grüne Kugeln\r\na red cube\n".encode())
    assert read_prompts(str(file)) == ["a red cube", "zwei grüne Kugeln", "a red cube"]


def test_json_lines_hold_objects_or_strings(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red cube", "id": 1}\n"a green ball"\n\n{"prompt": " "}\n')
    assert read_prompts(str(file)) == ["a red cube", "a green ball"]
    file.write_text('{"TEXT": "a red cube"}\n')
    assert read_prompts(str(file), key="TEXT") == ["a red cube"]


def test_a_pattern_joins_files_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.jsonl", "c.txt"):
        text = json.dumps({"prompt": name}) if name.endswith("jsonl") else name
        (tmp_path / name).write_text(text + "\n")
    assert read_prompts(str(tmp_path / "*")) == ["a.jsonl", "b.txt", "c.txt"]
    monkeypatch.chdir(tmp_path)
    assert read_prompts("[bc].txt") == ["b.txt", "c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\n \n", "holds no prompts; give at least one"),
        ("a.txt", b"caf\xe9\n", "is not UTF-8 .* at byte 3"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"caption": "a", "id": 3}\n', r"a\.jsonl:1 has no text under 'prompt' \(it has caption, id\)"),
        ("a.jsonl", b"[1]\n", r"it has list"),
        ("a.csv", b"a\n", r"ends in none of \.txt, \.jsonl, \.parquet"),
    ],
)
def test_files_that_cannot_be_used_are_told_with_their_line(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for pattern in ("none.txt", "*.txt"):
        with pytest.raises(DataError, match=r"there is no file .*; give one, or a pattern"):
            read_prompts(str(tmp_path / pattern))


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; name a file in it, or a pattern such as '.*/\*\.txt'"):
        read_prompts(str(tmp_path))


def test_missing_files_are_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")  # not read, so not found to be no text
    (tmp_path / "pictures").mkdir()
    check_files(FileData(prompts=str(tmp_path / "a.txt"), pictures=str(tmp_path / "pictures")))
    with pytest.raises(DataError, match=r"^data\.prompts: there is no file .*b\.txt"):
        check_files(FileData(prompts=str(tmp_path / "b.txt")))
    with pytest.raises(DataError, match=r"^data\.pictures: there is no file .*tar"):
        check_files(FileData(pictures=str(tmp_path / "*.tar")))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"need pyarrow, which is not installed; pip install 'leapfrog\[parquet\]'"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_parquet_gives_a_column(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = {"prompt": ["a red cube", None, " a ball "], "id": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    assert read_prompts(str(file)) == ["a red cube", "a ball"]
    with pytest.raises(DataError, match="has no column 'TEXT'; it has prompt, id"):
        read_prompts(str(file), key="TEXT")
    with pytest.raises(DataError, match="row 0 has int under 'id', not text"):
        read_prompts(str(file), key="id")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_prompts(str(file))
