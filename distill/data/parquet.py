"""Parquet files through pyarrow, which is 170 MB and so an extra of its own: ``pip install 'leapfrog[parquet]'``."""

from __future__ import annotations

import bisect
import importlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from distill.data.errors import DataError


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise DataError("Parquet files need pyarrow, which is not installed; pip install 'leapfrog[parquet]'") from None


def _open(file: Path) -> Any:
    reader = _pyarrow()
    try:
        return reader.ParquetFile(file)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{file} cannot be read as Parquet ({first}); write it again") from None


def _check_column(file: Path, table: Any, name: str) -> None:
    names = table.schema_arrow.names
    if name not in names:
        raise DataError(f"{file} has no column {name!r}; it has {', '.join(names)}")


def read_column(file: Path, name: str) -> list[Any]:
    """One column of a file as Python values. Raises DataError."""
    table = _open(file)
    _check_column(file, table, name)
    return table.read(columns=[name]).column(0).to_pylist()  # type: ignore[no-any-return]


class ParquetPictures:
    """Pictures and captions in tables, as the Hugging Face hub keeps them; a row group at a time is in memory.

    image: a column of encoded pictures, as bytes or as {bytes, path}. caption: text, or whole numbers for labels.
    Random draws read a whole row group each: write groups of about 100 pictures, as the hub's own tools do.
    """

    def __init__(self, files: Sequence[Path], image: str = "image", caption: str = "caption") -> None:
        self.image, self.caption = image, caption
        self.tables = [_open(file) for file in files]
        for file, table in zip(files, self.tables, strict=True):
            _check_column(file, table, image)
            _check_column(file, table, caption)
        groups = [
            (t, g, self.tables[t].metadata.row_group(g).num_rows)
            for t in range(len(files))
            for g in range(self.tables[t].num_row_groups)
        ]
        self.groups = [(t, g) for t, g, _ in groups]
        self.ends = list(accumulate(rows for _, _, rows in groups))
        self._held: tuple[int, list[Any], list[Any]] | None = None
        if not len(self):
            raise DataError(f"{files[0]} has no rows; give tables with pictures")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, index: int) -> bytes:
        """The encoded picture of a row."""
        row, images, _ = self._row(index)
        value = images[row]["bytes"] if isinstance(images[row], dict) else images[row]
        if not isinstance(value, bytes):
            raise DataError(f"row {index} has no bytes under {self.image!r}; embed the pictures in the table")
        return value

    def condition(self, index: int) -> str | int:
        row, _, captions = self._row(index)
        value = captions[row]
        if not isinstance(value, str | int):
            raise DataError(f"row {index} has {type(value).__name__} under {self.caption!r}; give text or a label")
        return value

    def name(self, index: int) -> str:
        return f"row {index}"

    def _row(self, index: int) -> tuple[int, list[Any], list[Any]]:
        group = bisect.bisect_right(self.ends, index)
        if self._held is None or self._held[0] != group:
            table, number = self.groups[group]
            read = self.tables[table].read_row_group(number, columns=[self.image, self.caption])
            self._held = (group, read.column(self.image).to_pylist(), read.column(self.caption).to_pylist())
        _, images, captions = self._held
        return index - (self.ends[group - 1] if group else 0), images, captions
