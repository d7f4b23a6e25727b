"""Real pictures with their captions or labels: from a folder, tars or Parquet, cut to one size.

source = open_pictures("/data/laion/*.tar")
image = cut(decode(source, 7), (1024, 1024))       # (3, 1024, 1024) uint8
source.condition(7)                                # its caption
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.data.errors import DataError
from distill.data.folders import FolderPictures
from distill.data.parquet import ParquetPictures
from distill.data.prompts import PICTURE_FILES, files_of
from distill.data.webdataset import TarPictures


class Pictures(Protocol):
    """Encoded pictures in a fixed order, each with a caption or a label."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file's bytes: what a picture is known by."""
        ...

    def condition(self, index: int) -> str | int: ...

    def name(self, index: int) -> str:
        """Where it lies, for messages."""
        ...


def open_pictures(source: str, caption: str = "caption") -> Pictures:
    """A folder, or the .tar or .parquet files of a path or pattern. Raises DataError.

    caption: the key of captions in JSON, and the column of Parquet.
    """
    if Path(source).is_dir():
        return FolderPictures(Path(source), caption)
    files = files_of(source, PICTURE_FILES)
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise DataError(f"{source} matches tars and Parquet files alike; narrow the pattern")
    return TarPictures(files, caption) if kinds == {".tar"} else ParquetPictures(files, caption=caption)


def decode(source: Pictures, index: int, data: bytes | None = None) -> Image.Image:
    """A picture in RGB; transparency is laid on white. Raises DataError that names one that cannot be read."""
    try:
        image: Image.Image = Image.open(io.BytesIO(source.read(index) if data is None else data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{source.name(index)} cannot be read as a picture ({first}); remove or repair it") from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def cut(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of a picture after its shorter side was brought to ``size`` = (width, height): (3, H, W) uint8.

    Lanczos, as DMD2 prepares its pictures; small ones are enlarged.
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    larger = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if larger != image.size:
        image = image.resize(larger, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
