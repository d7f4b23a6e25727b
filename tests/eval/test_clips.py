"""Clips written and read back bit for bit, and files that are not whole refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.clips import read_clip, write_clip
from eval.errors import EvalError

pytest.importorskip("av", reason="clips need PyAV: pip install av")


def noise(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("fps", [8.0, 24.0, 29.97])
def test_a_clip_comes_back_bit_for_bit_at_its_rate(fps: float, tmp_path: Path) -> None:
    frames, rate = read_clip(write_clip(tmp_path / "deep" / "clip.mp4", noise(), fps))
    np.testing.assert_array_equal(frames, noise())
    assert rate == pytest.approx(fps, rel=1e-4)


def test_files_that_are_no_whole_clip_are_refused(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", noise(12)).read_bytes()
    for name, data in (("empty", b""), ("text", b"no clip" * 50), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.mp4").write_bytes(data)
        with pytest.raises(EvalError, match=f"{name}.mp4"):
            read_clip(tmp_path / f"{name}.mp4")
    with pytest.raises(EvalError, match=r"gone.mp4 is missing"):
        read_clip(tmp_path / "gone.mp4")


def test_what_is_no_clip_is_not_written(tmp_path: Path) -> None:
    for frames in (noise().astype(float), noise()[:0], noise()[0]):
        with pytest.raises(EvalError, match=r"give \(F, 3, H, W\) uint8"):
            write_clip(tmp_path / "clip.mp4", frames)
