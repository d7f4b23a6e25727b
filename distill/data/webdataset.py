"""Pictures in webdataset's tar files, read where they lie: nothing is unpacked, and any picture can be drawn next.

Members of one sample share their name up to the first dot of the last part: ``0001.jpg`` with ``0001.txt`` (a caption),
``0001.cls`` (a label) or ``0001.json`` (an object with the caption under a key). The headers of a tar are read once,
when it is opened.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.data.errors import DataError
from distill.data.folders import ENDINGS


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar: bytes from ``offset`` on."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarPictures:
    """The pictures of several tars, in their order and that of their members."""

    def __init__(self, tars: Sequence[Path], caption: str = "caption") -> None:
        """caption: its key in .json members. Raises DataError for a tar that is cut off or lacks captions."""
        self.caption = caption
        samples = [sample for tar in tars for sample in _samples(tar)]
        self.pictures = [sample[0] for sample in samples]
        self.notes = [sample[1] for sample in samples]
        if not samples:
            raise DataError(f"{tars[0]} holds no pictures ({', '.join(ENDINGS)}); give other tars")

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> bytes:
        return self.pictures[index].read()

    def condition(self, index: int) -> str | int:
        note = self.notes[index]
        text = note.read().decode("utf-8-sig").strip()
        if note.name.endswith(".txt"):
            return text
        try:
            value = int(text) if note.name.endswith(".cls") else json.loads(text)[self.caption]
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str | int):
            raise DataError(
                f"{note.tar}: {note.name} gives no label, and no text under {self.caption!r}; name the caption's key"
            )
        return value

    def name(self, index: int) -> str:
        return f"{self.pictures[index].tar}: {self.pictures[index].name}"


def _samples(tar: Path) -> list[tuple[Member, Member]]:
    """(picture, caption) of every sample with a picture."""
    found: dict[str, dict[str, Member]] = {}
    for member in _members(tar):
        folder, _, last = member.name.rpartition("/")
        stem, _, ending = last.partition(".")
        found.setdefault(f"{folder}/{stem}", {})["." + ending.lower()] = member
    samples = []
    for stem, parts in found.items():
        picture = next((parts[ending] for ending in ENDINGS if ending in parts), None)
        note = next((parts[ending] for ending in (".txt", ".cls", ".json") if ending in parts), None)
        if picture is None:
            continue
        if note is None:
            raise DataError(f"{tar}: {picture.name} has no caption; add {stem.strip('/')}.txt, .cls or .json")
        samples.append((picture, note))
    return samples


def _members(tar: Path) -> list[Member]:
    try:
        with tarfile.open(tar, "r:") as archive:
            files = [Member(tar, info.name, info.offset_data, info.size) for info in archive if info.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} cannot be read as a tar ({error}); compressed ones must be unpacked once") from None
    size = tar.stat().st_size
    if files and files[-1].offset + files[-1].size > size:
        raise DataError(f"{tar} is cut off within {files[-1].name} ({size} bytes); copy it again")
    return files
