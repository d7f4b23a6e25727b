"""Frames to video files while they come: H.264 in MP4, VP9 in WebM, or GIF; a thumbnail and a sheet of all frames.

    with Clip(path, "mp4", size=(64, 64), fps=8) as clip:
        clip.write(frames)                       # (n, H, W, 3) uint8, any number of times
    clip.size_bytes                              # the file is complete; after an exception there is none

A file is written beside its place under a name of its own and moved when it is whole, so that nobody reads half of one.
MP4 has its index in front ("faststart"): players begin before the last byte has come. One thread compresses a clip, so
that the same frames give the same bytes on any number of cores.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

from service.runtimes.base import Images

ClipFormat = Literal["mp4", "webm", "gif"]
MEDIA_TYPES: dict[str, str] = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "gif": "image/gif",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
}
CODECS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "mp4": (
        "libx264",
        # Without the tree of macroblocks: on processors with AVX-512 it gives one clip several files.
        {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"},
        {"movflags": "faststart"},
    ),
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "5", "row-mt": "0", "threads": "1"}, {}),
}
"""Encoder, its options and the container's; quality is held, not the rate, as clips are short."""
THUMBNAIL, SHEET = 256, 1024
"""Pixels of the longer side of a thumbnail, and of the width of a sheet."""


class Clip:
    """One file on its way; a context: leaving it without an exception completes the file, any other way removes it."""

    def __init__(self, path: Path, file_format: ClipFormat, size: tuple[int, int], fps: float) -> None:
        self.path, self.size_bytes = path, 0
        self._draft = path.with_name(path.name + ".part")
        self._writer = Gif(self._draft, fps) if file_format == "gif" else Stream(self._draft, file_format, size, fps)

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._writer.finish()
                self.size_bytes = self._draft.stat().st_size
                self._draft.replace(self.path)
        finally:
            self._writer.close()
            self._draft.unlink(missing_ok=True)

    def write(self, frames: Images) -> None:
        """Compress frames (n, H, W, 3) uint8. Raises OSError when the disk is full."""
        for frame in frames:
            self._writer.add(np.ascontiguousarray(frame))


class Stream:
    """A video stream in a container, by FFmpeg."""

    def __init__(self, path: Path, file_format: str, size: tuple[int, int], fps: float) -> None:
        codec, options, container = CODECS[file_format]
        # Without bitexact WebM carries a random number.
        self._file: Any = av.open(str(path), "w", format=file_format, options={"fflags": "+bitexact", **container})
        stream: Any = self._file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        self._stream, self._count = stream, 0

    def add(self, frame: Images) -> None:
        picture = av.VideoFrame.from_ndarray(yuv420(frame), format="yuv420p")
        picture.pts = self._count
        self._count += 1
        self._file.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._file.mux(self._stream.encode())
        self._file.close()

    def close(self) -> None:
        """After ``finish`` nothing; without it, what FFmpeg says of the rest of a broken file is no news."""
        with contextlib.suppress(OSError, ValueError):
            self._file.close()


def yuv420(frame: Images) -> Images:
    """(H, W, 3) uint8 with even sides to the planes of yuv420p, (3·H/2, W) uint8: BT.601, limited range.

    In whole numbers, as FFmpeg's own conversion takes other ways by where in memory a frame lies, with other last bits.
    """
    height, width, _ = frame.shape
    red, green, blue = (frame[..., k].astype(np.int32) for k in range(3))
    luma = ((66 * red + 129 * green + 25 * blue + 128) >> 8) + 16
    r, g, b = (x.reshape(height // 2, 2, width // 2, 2).sum((1, 3)) for x in (red, green, blue))
    chroma = (((-38 * r - 74 * g + 112 * b + 512) >> 10) + 128, ((112 * r - 94 * g - 18 * b + 512) >> 10) + 128)
    planes = np.concatenate([plane.ravel() for plane in (luma, *chroma)])
    return planes.astype(np.uint8).reshape(height * 3 // 2, width)


class Gif:
    """An animated GIF for ever, each frame with the 256 colours that suit it best."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._duration_ms = path, 1000 / fps
        self._pictures: list[Image.Image] = []

    def add(self, frame: Images) -> None:
        self._pictures.append(Image.fromarray(frame).quantize(256))

    def finish(self) -> None:
        first, *rest = self._pictures
        ends = [round(k * self._duration_ms / 10) * 10 for k in range(len(self._pictures) + 1)]  # in hundredths
        first.save(
            self._path,
            "GIF",
            save_all=True,
            append_images=rest,
            duration=[end - begin for begin, end in pairwise(ends)],
            loop=0,
            optimize=False,
        )

    def close(self) -> None:
        self._pictures.clear()


def thumbnail(frame: Images) -> bytes:
    """WebP of one frame (H, W, 3), at most THUMBNAIL pixels wide or high."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _file(lambda buffer: image.save(buffer, "WEBP", quality=85, method=2))


def spritesheet(frames: Images) -> bytes:
    """JPEG of all frames (F, H, W, 3) in rows, in the order of reading, about square, at most SHEET pixels wide."""
    count, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    sheet[:count] = frames
    tiled = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(np.ascontiguousarray(tiled.reshape(rows * height, columns * width, 3)))
    if image.width > SHEET:
        image = image.resize((SHEET, round(image.height * SHEET / image.width)), Image.Resampling.LANCZOS)
    return _file(lambda buffer: image.save(buffer, "JPEG", quality=85))


def shrunk(frames: Images, columns: int) -> Images:
    """Frames as small as a sheet of ``columns`` of them will show, so that nobody holds a long clip for it."""
    width = frames.shape[2]
    cell = max(1, SHEET // columns)
    if width <= cell:
        return frames
    height = max(1, round(frames.shape[1] * cell / width))
    small = [np.asarray(Image.fromarray(frame).resize((cell, height), Image.Resampling.BILINEAR)) for frame in frames]
    return np.stack(small)


def _file(save: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()
