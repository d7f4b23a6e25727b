"""Files that join a bundle together or not at all: drafts first, then all of them and the manifest, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.bundle import Bundle, Manifest, write_manifest

SUFFIX = ".draft.tmp"
"""Of drafts, which lie where they will be: from there graphs find their weights. Manifests list nothing in .tmp."""
MARGIN = 1.1
"""Of the room that is asked for: file systems need some for themselves."""


class DiskFull(Exception):
    """The drafts will not fit; the message tells how much is missing and where."""


class Drafts:
    """Where the files of a bundle are written until all of them are right."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._finals: dict[Path, Path] = {}

    def path(self, final: Path) -> Path:
        """Where to write what shall be at ``final``; its folder exists."""
        draft = final.with_name(final.name + SUFFIX)
        draft.parent.mkdir(parents=True, exist_ok=True)
        self._finals[draft] = final
        return draft

    def move(self, draft: Path, final: Path) -> Path:
        """Move a draft to where what shall be at another ``final`` is written; returns the new draft."""
        del self._finals[draft]
        moved = draft.rename(self.path(final))
        _remove_empty(self._root, [draft])
        return moved

    def commit(self, manifest: Manifest, obsolete: Iterable[Path] = ()) -> Bundle:
        """Put every draft in its place, drop what is obsolete and write the manifest; on any failure undo all of it."""
        finals = self._finals
        gone = {path for path in obsolete if path not in finals.values()}
        kept = {path: path.with_name(path.name + ".old.tmp") for path in (*finals.values(), *gone)}
        placed: list[Path] = []
        try:
            for path, old in kept.items():
                if path.is_file():
                    os.replace(path, old)
            for draft, final in finals.items():
                os.replace(draft, final)
                placed.append(final)
            bundle = write_manifest(self._root, manifest)
        except BaseException:
            for final in placed:
                final.unlink()
            for path, old in kept.items():
                if old.is_file():
                    os.replace(old, path)
            (self._root / "bundle.json.tmp").unlink(missing_ok=True)
            raise
        for old in kept.values():
            old.unlink(missing_ok=True)
        _remove_empty(self._root, gone)
        return bundle

    def clear(self) -> None:
        """Remove drafts, those of an export that was killed too, and the folders that were made for them."""
        for draft in self._root.rglob(f"*{SUFFIX}*"):
            draft.unlink()
        _remove_empty(self._root, self._finals)


@contextlib.contextmanager
def drafts(root: Path) -> Iterator[Drafts]:
    """Drafts for the bundle at ``root``; whatever was not committed is gone afterwards."""
    made = Drafts(root)
    made.clear()
    try:
        yield made
    finally:
        made.clear()


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise DiskFull before work begins when the file system of ``folder`` has too little room for what it makes."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes * MARGIN:
        raise DiskFull(
            f"{folder} has {free / 1e6:.0f} MB free and the export needs {needed_bytes * MARGIN / 1e6:.0f} MB; "
            "make room or move the bundle"
        )


def _remove_empty(root: Path, files: Iterable[Path]) -> None:
    """Remove the folders of files that are gone, as far as nothing else lies in them."""
    for file in files:
        for folder in file.parents:
            if folder == root or root not in folder.parents:
                break
            with contextlib.suppress(OSError):
                folder.rmdir()
