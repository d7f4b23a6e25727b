"""Clips as files, by PyAV: written without loss, read strictly.

    write_clip(path, frames, fps=8)      # frames (F, 3, H, W) uint8; H.264 in RGB at quantiser 0: bit for bit
    frames, fps = read_clip(path)

Codecs are part of a score: VBench's flickering of one clip differs by 0.0006 between lossless and imageio's default.
"""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError

Frames = NDArray[np.uint8]
"""(F, 3, H, W)."""
_CODEC, _OPTIONS = "libx264rgb", {"crf": "0", "preset": "veryfast"}


def _av() -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise EvalError(f"clips need PyAV, which is not here ({error}); run: pip install av") from None


def write_clip(path: Path, frames: Frames, fps: float = 8.0) -> Path:
    """Write (F, 3, H, W) uint8 as an .mp4 that reads back to the same pixels."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.size:
        raise EvalError(f"a clip has shape {frames.shape} and type {frames.dtype}; give (F, 3, H, W) uint8")
    av = _av()
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def read_clip(path: Path) -> tuple[Frames, float]:
    """Every frame (F, 3, H, W) uint8 and the frames per second.

    Raises EvalError for a file that is missing, no video, not decodable or shorter than its header says. H.264 has no
    checksum: damage that still decodes is not seen.
    """
    if not path.is_file():
        raise EvalError(f"{path.name} is missing; make it again")
    av = _av()
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise EvalError(f"{path.name} holds no video; make it again")
            stream = file.streams.video[0]
            promised, fps = stream.frames, float(stream.average_rate or 0)
            pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    except (av.FFmpegError, ValueError) as error:
        raise EvalError(f"{path.name} cannot be decoded ({error}); make it again") from None
    if not pictures or len(pictures) < promised:
        raise EvalError(f"{path.name} holds {len(pictures)} of {promised} frames; make it again")
    if len({picture.shape for picture in pictures}) > 1:
        raise EvalError(f"{path.name} changes its size in the middle; make it again")
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)), fps
