"""Computed rows on disk, each known by the content that it was computed from: latents of pictures, states of prompts.

    rows = RowCache("latents-3f2a…", count=50_000, fields={"latents": ((4, 128, 128), "float16")})
    rows.read(7, source) or rows.write(7, source, values)         # source: digest of the picture's bytes

One sparse file holds a record per row and one its checks: blake2b of source and record. A record is given back only if
its check fits, so a changed picture, a row that was never written and one that a crash tore apart are all computed
anew; several processes may write at once, and an interrupted run has lost nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data import cache

_CHECK = 16
Fields = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and numpy's dtype of each part of a row."""


def content_digest(*parts: bytes | str) -> bytes:
    """16 bytes that depend on every part and on where each ends."""
    digest = hashlib.blake2b(digest_size=_CHECK)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class RowCache:
    """``count`` rows under LEAPFROG_CACHE, named by what computes them: weights, size, precision."""

    def __init__(self, name: str, count: int, fields: Fields) -> None:
        self.fields = {key: (shape, np.dtype(kind)) for key, (shape, kind) in fields.items()}
        self.record = sum(prod(shape) * kind.itemsize for shape, kind in self.fields.values())
        form = content_digest(repr((count, sorted(fields.items())))).hex()[:10]
        self.path = cache.CACHE / f"{name}-{form}.rows"
        self._records = _mapped(self.path, (count, self.record))
        self._checks = _mapped(self.path.with_suffix(".checks"), (count, _CHECK))

    def read(self, row: int, source: bytes) -> dict[str, NDArray[np.generic]] | None:
        """The row if it was computed from ``source``, else None."""
        data = self._records[row].tobytes()
        if self._checks[row].tobytes() != content_digest(source, data):
            return None
        found, start = {}, 0
        for key, (shape, kind) in self.fields.items():
            stop = start + prod(shape) * kind.itemsize
            found[key] = np.frombuffer(data[start:stop], kind).reshape(shape)
            start = stop
        return found

    def write(self, row: int, source: bytes, values: Mapping[str, NDArray[np.generic]]) -> None:
        """Keep a row. Raises ValueError for parts of another shape."""
        for key, (shape, _) in self.fields.items():
            if values[key].shape != shape:
                raise ValueError(f"{self.path.name}: {key} is {values[key].shape}, not {shape}")
        data = b"".join(np.ascontiguousarray(values[k], kind).tobytes() for k, (_, kind) in self.fields.items())
        self._records[row] = np.frombuffer(data, np.uint8)
        self._checks[row] = np.frombuffer(content_digest(source, data), np.uint8)


def _mapped(path: Path, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """A file of zeros as writable memory, made once whoever comes first; holes take no space on disk."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
        with draft.open("wb") as file:
            file.truncate(shape[0] * shape[1])
        try:
            os.link(draft, path)  # unlike a rename, never over the file of a process that was faster
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(draft, path)
        draft.unlink(missing_ok=True)
    return np.memmap(path, np.uint8, "r+", shape=shape)
