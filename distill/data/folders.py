"""Pictures in a folder, with captions in one of three usual ways, or classes as its subfolders.

metadata.jsonl      {"file_name": "a/1.jpg", "caption": "a red cube"} per line, as the Hugging Face hub reads folders
1.jpg + 1.txt       a caption of the same name beside each picture
n01440764/1.jpg     no captions: the subfolders in the order of their names are the classes 0, 1, …, as in ImageNet
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.data.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
METADATA = "metadata.jsonl"


class FolderPictures:
    """The pictures below a folder in the order of their paths."""

    def __init__(self, folder: Path, caption: str = "caption") -> None:
        """caption: its key in metadata.jsonl. Raises DataError for pictures without a condition."""
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not self.paths:
            raise DataError(f"{folder} holds no pictures ({', '.join(ENDINGS)}); give another folder")
        if (folder / METADATA).is_file():
            self.conditions = self._listed(caption)
        elif self.paths[0].with_suffix(".txt").is_file():
            self.conditions = self._beside()
        else:
            self.conditions = self._classes()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def condition(self, index: int) -> str | int:
        return self.conditions[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def _listed(self, key: str) -> list[str | int]:
        captions: dict[str, str | int] = {}
        for number, line in enumerate((self.folder / METADATA).read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                captions |= self._entry(number, line, key)
        missing = [path for path in self.paths if path.relative_to(self.folder).as_posix() not in captions]
        if missing:
            raise DataError(f"{missing[0]} is not in {self.folder / METADATA}; list it, or move it elsewhere")
        return [captions[path.relative_to(self.folder).as_posix()] for path in self.paths]

    def _entry(self, number: int, line: str, key: str) -> dict[str, str | int]:
        where = f"{self.folder / METADATA}:{number}"
        try:
            entry = json.loads(line)
            name, value = entry["file_name"], entry[key]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"{where} is no object with 'file_name' and {key!r}; name the caption's key") from None
        if not isinstance(value, str | int):
            raise DataError(f"{where} has {type(value).__name__} under {key!r}; give text or a label")
        return {name: value}

    def _beside(self) -> list[str | int]:
        found: list[str | int] = []
        for path in self.paths:
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise DataError(f"{path} has no caption beside it; write {text.name}, or move it elsewhere")
            found.append(text.read_text(encoding="utf-8-sig").strip())
        return found

    def _classes(self) -> list[str | int]:
        parts = [path.relative_to(self.folder).parts for path in self.paths]
        flat = next((path for path, part in zip(self.paths, parts, strict=True) if len(part) < 2), None)
        if flat is not None:
            raise DataError(
                f"{flat} has neither a caption nor a class; add {METADATA}, {flat.stem}.txt, or a subfolder per class"
            )
        classes = {name: label for label, name in enumerate(sorted({part[0] for part in parts}))}
        return [classes[part[0]] for part in parts]
