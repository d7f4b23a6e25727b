"""Files that join a bundle together or not at all: drafts first, then all of them and the manifest, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.bundle import Bundle, Manifest, write_manifest

MARGIN = 1.1
"""Of the room that is asked for: file systems need some for themselves."""


class DiskFull(Exception):
    """The drafts will not fit; the message tells how much is missing and where."""


class Drafts:
    """Final paths of a bundle and where they are written meanwhile. Names that end in .tmp are in no manifest."""

    def __init__(self, root: Path, finals: Iterable[Path]) -> None:
        self._root, self._finals = root, tuple(finals)

    def path(self, final: Path) -> Path:
        assert final in self._finals, f"{final} is none of {self._finals}"
        return final.with_name(final.name + ".tmp")

    def commit(self, manifest: Manifest, obsolete: Iterable[Path] = ()) -> Bundle:
        """Put every draft in its place, drop what is obsolete and write the manifest; on any failure undo all of it."""
        gone = [path for path in obsolete if path not in self._finals]
        kept = {path: path.with_name(path.name + ".old.tmp") for path in (*self._finals, *gone)}
        placed: list[Path] = []
        try:
            for path, old in kept.items():
                if path.is_file():
                    os.replace(path, old)
            for final in self._finals:
                os.replace(self.path(final), final)
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
        return bundle


@contextlib.contextmanager
def drafts(root: Path, finals: Iterable[Path]) -> Iterator[Drafts]:
    """Drafts whose folders exist; whatever was not committed is gone afterwards, empty folders too."""
    made = Drafts(root, finals)
    folders = {final.parent for final in made._finals}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        yield made
    finally:
        for final in made._finals:
            made.path(final).unlink(missing_ok=True)
        for folder in folders:
            for path in (folder, *folder.parents):
                if path == root or root not in path.parents:
                    break
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise DiskFull before work begins when the file system of ``folder`` has too little room for what it makes."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes * MARGIN:
        raise DiskFull(
            f"{folder} has {free / 1e6:.0f} MB free and the export needs {needed_bytes * MARGIN / 1e6:.0f} MB; "
            "make room or move the bundle"
        )
