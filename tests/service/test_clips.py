"""Frames become files that players and Pillow read back, whole or not at all."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
from PIL import Image

from service.clips import SHEET, Clip, ClipFormat, shrunk, spritesheet, thumbnail, yuv420

FORMATS = get_args(ClipFormat)


@pytest.fixture
def frames() -> Any:
    """Seventeen frames (17, 64, 64, 3) of a bright square that moves to the right."""
    made = np.full((17, 64, 64, 3), 40, dtype=np.uint8)
    for i, frame in enumerate(made):
        frame[20:44, 2 * i : 2 * i + 24] = (220, 60, 40)
    return made


def written(path: Path, file_format: ClipFormat, pieces: list[Any], fps: float = 8.0) -> bytes:
    with Clip(path, file_format, (64, 64), fps) as clip:
        for piece in pieces:
            clip.write(piece)
    assert clip.size_bytes == path.stat().st_size
    return path.read_bytes()


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_written_is_read_back(tmp_path: Path, frames: Any, file_format: ClipFormat) -> None:
    path = tmp_path / f"clip.{file_format}"
    written(path, file_format, [frames])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(stream.average_rate or 0) == pytest.approx(8, rel=0.05), "a GIF's time is in hundredths"
        if file_format != "gif":
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (
                {"mp4": "h264", "webm": "vp9"}[file_format],
                "yuv420p",
            )
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames.astype(int)).mean() < 3


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_frames_give_the_same_bytes_however_they_come(
    tmp_path: Path, frames: Any, file_format: ClipFormat
) -> None:
    whole = written(tmp_path / "whole", file_format, [frames])
    assert written(tmp_path / "pieces", file_format, [frames[:1], frames[1:9], frames[9:]]) == whole


def test_colours_are_bt601_in_whole_numbers() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    planes = yuv420(np.repeat(np.repeat(colours[None], 2, 0), 2, 1))
    assert planes.shape == (3, 8)
    assert planes[0].tolist() == [16, 16, 235, 235, 82, 82, 41, 41]
    assert planes[2].tolist() == [128, 128, 90, 240, 128, 128, 240, 110]


def test_the_index_of_an_mp4_is_in_front(tmp_path: Path, frames: Any) -> None:
    data = written(tmp_path / "clip.mp4", "mp4", [frames])
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_a_fraction_of_frames_per_second_is_kept(tmp_path: Path, frames: Any) -> None:
    written(tmp_path / "clip.mp4", "mp4", [frames], fps=23.976)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(23.976, rel=1e-3)


def test_an_exception_leaves_no_file(tmp_path: Path, frames: Any) -> None:
    with pytest.raises(IndexError):
        written(tmp_path / "clip.mp4", "mp4", [frames[:4], frames[..., :1]])
    assert not list(tmp_path.iterdir())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow further, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_full_disk_is_an_oserror_and_leaves_no_file(tmp_path: Path, file_format: ClipFormat) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    with files_up_to(10_000), pytest.raises(OSError, match="too large"):
        written(tmp_path / "clip", file_format, [noise])
    assert not list(tmp_path.iterdir())


def test_thumbnails_are_small_and_keep_their_proportions() -> None:
    image = Image.open(io.BytesIO(thumbnail(np.zeros((480, 832, 3), dtype=np.uint8))))
    assert (image.format, image.size) == ("WEBP", (256, 148))


def test_a_sheet_has_every_frame_in_the_order_of_reading(frames: Any) -> None:
    frames[6] = 255
    sheet = np.asarray(Image.open(io.BytesIO(spritesheet(frames))).convert("L"))
    assert sheet.shape == (4 * 64, 5 * 64)
    bright = [(row, column) for row in range(4) for column in range(5) if sheet[row * 64 + 5, column * 64 + 5] > 200]
    assert bright == [(1, 1)]


def test_sheets_of_large_clips_are_bounded() -> None:
    large = np.zeros((9, 480, 832, 3), dtype=np.uint8)
    small = shrunk(large, 3)
    assert small.shape == (9, 197, 341, 3)
    assert Image.open(io.BytesIO(spritesheet(small))).width <= SHEET
    assert shrunk(large[:, :64, :64], 3).shape == (9, 64, 64, 3)
