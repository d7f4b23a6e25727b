"""Files join a bundle together or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill.bundle import Bundle, sha256
from distill.export import drafts as module
from distill.export.drafts import DiskFull, check_room, drafts


def listing(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tiny_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_drafts_take_their_places_and_what_is_obsolete_goes(root: Path) -> None:
    old, new = root / "step.onnx", root / "engines" / "key" / "step.engine"
    with drafts(root) as made:
        for final in (old, new):
            made.path(final).write_bytes(b"new")
        bundle = made.commit(Bundle.open(root).manifest, obsolete=[root / "decoder.onnx"])
    assert old.read_bytes() == new.read_bytes() == b"new"
    assert bundle.manifest.files.keys() >= {"step.onnx", "engines/key/step.engine"}
    assert not (root / "decoder.onnx").exists()
    assert not list(root.rglob("*.tmp"))
    Bundle.open(root)


def test_a_draft_can_be_moved_until_its_place_is_known(root: Path) -> None:
    with drafts(root) as made:
        draft = made.path(root / "rtx" / "building" / "step.engine")
        draft.write_bytes(b"engine")
        moved = made.move(draft, root / "rtx" / "sm80" / "step.engine")
        assert moved.read_bytes() == b"engine"
        made.commit(Bundle.open(root).manifest)
    assert [path.name for path in (root / "rtx").iterdir()] == ["sm80"]
    assert (root / "rtx" / "sm80" / "step.engine").read_bytes() == b"engine"


def test_drafts_of_an_export_that_was_killed_are_gone_at_the_next(root: Path) -> None:
    (root / "step.onnx.draft.tmp").write_bytes(b"half")
    (root / "decoder.onnx.draft.tmp.tmp").write_bytes(b"half")
    with drafts(root) as made:
        made.path(root / "new.onnx").write_bytes(b"new")
        bundle = made.commit(Bundle.open(root).manifest)
    assert "new.onnx" in bundle.manifest.files
    assert (root / "step.onnx").read_bytes() != b"half"
    assert not list(root.rglob("*.tmp"))


def test_a_manifest_that_cannot_be_written_undoes_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, manifest = listing(root), Bundle.open(root).manifest
    old, new = root / "step.onnx", root / "engines" / "step.engine"

    def full(path: Path, manifest: object) -> Bundle:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)

    def write() -> None:
        with drafts(root) as made:
            for final in (old, new):
                made.path(final).write_bytes(b"new")
            made.commit(manifest)

    with pytest.raises(OSError, match="No space left"):
        write()
    assert listing(root) == before
    assert not (root / "engines").exists()


def test_a_failure_while_drafts_are_written_leaves_nothing(root: Path) -> None:
    before = listing(root)

    def write() -> None:
        with drafts(root) as made:
            made.path(root / "engines" / "key" / "step.engine").write_bytes(b"ha")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write()
    assert listing(root) == before
    assert not (root / "engines").exists()


def test_too_little_room_is_told_before_work_begins(root: Path) -> None:
    check_room(root, 1)
    with pytest.raises(DiskFull, match=r"MB free and the export needs 1100000000000 MB; make room or move the bundle"):
        check_room(root, 10**18)
