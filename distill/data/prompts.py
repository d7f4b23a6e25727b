"""Prompts from files: one per line, JSON lines, or a column of Parquet.

    prompts = read_prompts("prompts.txt")                     # a line each; empty lines are skipped
    prompts = read_prompts("laion/*.parquet", key="TEXT")     # a pattern joins its files in the order of their names

A prompt that comes twice stays twice: it is drawn twice as often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from distill.config import FileData
from distill.data.errors import DataError
from distill.data.parquet import read_column

PICTURE_FILES = (".tar", ".parquet")


def files_of(pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """The files of a path or glob pattern in the order of their names. Raises DataError if there are none."""
    path = Path(pattern)
    plain = not any(letter in pattern for letter in "*?[")
    found = [path] if plain else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    found = [file for file in found if file.is_file()]
    wrong = [file for file in found if not file.name.endswith(endings)]
    if path.is_dir():
        raise DataError(f"{pattern!r} is a folder; name a file in it, or a pattern such as '{path}/*{endings[0]}'")
    if not found:
        raise DataError(f"there is no file {pattern!r}; give one, or a pattern such as 'data/*{endings[0]}'")
    if wrong:
        raise DataError(f"{wrong[0]} ends in none of {', '.join(endings)}; convert it, or narrow the pattern")
    return found


def read_prompts(pattern: str, key: str = "prompt") -> list[str]:
    """Every prompt of a file or pattern, without white space around it. Raises DataError that names file and line.

    key: what holds the prompt in a JSON object or a Parquet table; plain text needs none.
    """
    prompts = [text for file in files_of(pattern, tuple(_READERS)) for text in _READERS[file.suffix](file, key)]
    if not prompts:
        raise DataError(f"{pattern} holds no prompts; give at least one that is not empty")
    return prompts


def check_files(data: FileData) -> None:
    """Raises DataError where a recipe's files are not there, before anything heavy is loaded; reads none of them."""
    for key, value, endings in (("prompts", data.prompts, tuple(_READERS)), ("pictures", data.pictures, PICTURE_FILES)):
        if value and not (key == "pictures" and Path(value).is_dir()):
            try:
                files_of(value, endings)
            except DataError as error:
                raise DataError(f"data.{key}: {error}") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty; a byte-order mark is no part of the first."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _from_text(file: Path, key: str) -> Iterator[str]:
    return (text for _, text in _lines(file))


def _from_json_lines(file: Path, key: str) -> Iterator[str]:
    for number, line in _lines(file):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number} is not JSON ({error.msg}); give one object or string per line") from None
        text = entry.get(key) if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            keys = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f"{file}:{number} has no text under {key!r} (it has {keys}); name the key of the prompt")
        if text.strip():
            yield text.strip()


def _from_parquet(file: Path, key: str) -> Iterator[str]:
    for row, text in enumerate(read_column(file, key)):
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"{file} row {row} has {type(text).__name__} under {key!r}, not text; name another column")
        if text.strip():
            yield text.strip()


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".parquet": _from_parquet,
}
