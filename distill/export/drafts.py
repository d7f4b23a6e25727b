"""Files that join a bundle together or not at all: drafts first, then all of them and the manifest, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.bundle import Bundle, Manifest, write_manifest

FOLDER = "drafts.tmp"
"""Of drafts, in the bundle: on its file system, and under their final names, by which graphs find their weights."""
MARGIN = 1.1
"""Of the room that is asked for: file systems need some for themselves."""


class DiskFull(Exception):
    """The drafts will not fit; the message tells how much is missing and where."""


class Drafts:
    """Where the files of a bundle are written until all of them are right."""

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / FOLDER

    def path(self, final: Path) -> Path:
        """Where to write what shall be at ``final``; its folder exists."""
        draft = self._folder / final.relative_to(self._root)
        draft.parent.mkdir(parents=True, exist_ok=True)
        return draft

    def commit(self, manifest: Manifest, obsolete: Iterable[Path] = ()) -> Bundle:
        """Put every draft in its place, drop what is obsolete and write the manifest; on any failure undo all of it."""
        drafts = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        finals = {draft: self._root / draft.relative_to(self._folder) for draft in drafts}
        gone = {path for path in obsolete if path not in finals.values()}
        kept = {path: path.with_name(path.name + ".old.tmp") for path in (*finals.values(), *gone)}
        placed: list[Path] = []
        try:
            for path, old in kept.items():
                if path.is_file():
                    os.replace(path, old)
            for draft, final in finals.items():
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft, final)
                placed.append(final)
            shutil.rmtree(self._folder)
            bundle = write_manifest(self._root, manifest)
        except BaseException:
            for final in placed:
                final.unlink()
            for path, old in kept.items():
                if old.is_file():
                    os.replace(old, path)
            (self._root / "bundle.json.tmp").unlink(missing_ok=True)
            _remove_empty(self._root, kept)
            raise
        for old in kept.values():
            old.unlink(missing_ok=True)
        _remove_empty(self._root, gone)
        return bundle


@contextlib.contextmanager
def drafts(root: Path) -> Iterator[Drafts]:
    """Drafts for the bundle at ``root``; whatever was not committed is gone afterwards."""
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    try:
        yield Drafts(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
