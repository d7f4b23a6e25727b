"""Rows on disk are given back only for the content that they were computed from, and only whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.data import cache
from distill.data.rows import RowCache, content_digest

FIELDS = {"latents": ((2, 3), "float16"), "mask": ((4,), "int64")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def row(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"latents": rng.standard_normal((2, 3)).astype(np.float16), "mask": rng.integers(0, 9, 4)}


def test_a_row_comes_back_as_it_was_written() -> None:
    rows = RowCache("some", 5, FIELDS)
    assert rows.read(3, b"x") is None
    rows.write(3, b"x", row(1))
    for again in (rows, RowCache("some", 5, FIELDS)):
        found = again.read(3, b"x")
        assert found is not None and found.keys() == FIELDS.keys()
        for key, value in row(1).items():
            assert np.array_equal(found[key], value) and found[key].dtype == value.dtype
        assert again.read(3, b"y") is None and again.read(2, b"x") is None


def test_rows_of_zeros_and_torn_rows_are_not_taken_for_written_ones() -> None:
    rows = RowCache("some", 2, FIELDS)
    assert rows.read(0, b"") is None
    rows.write(0, b"x", row(1))
    rows._records[0, 5] ^= 1
    assert rows.read(0, b"x") is None
    rows.write(0, b"x", row(1))
    assert rows.read(0, b"x") is not None


def test_another_form_is_another_file() -> None:
    first = RowCache("some", 5, FIELDS)
    assert first.path != RowCache("some", 6, FIELDS).path
    assert first.path != RowCache("some", 5, {**FIELDS, "mask": ((4,), "int32")}).path
    assert not list(first.path.parent.glob("*.tmp"))


def test_holes_take_no_space() -> None:
    path = RowCache("large", 100_000, {"latents": ((4, 64, 64), "float16")}).path
    assert path.stat().st_size == 100_000 * 4 * 64 * 64 * 2 and path.stat().st_blocks * 512 < 1_000_000


def test_parts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents is \(3, 2\), not \(2, 3\)"):
        RowCache("some", 5, FIELDS).write(0, b"", {**row(1), "latents": np.zeros((3, 2))})


def test_digests_know_where_parts_end() -> None:
    assert content_digest("ab", "c") != content_digest("a", "bc") != content_digest("abc")
    assert content_digest("ab", b"c") == content_digest(b"ab", "c") and len(content_digest()) == 16
