"""Rendered scenes on disk: the same integers always give the same pictures, so a file is named by what is in it.

images = scene_images(seed=1, count=50_000)      # (N, 3, 64, 64) uint8, memory-mapped; renders once
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distill.data import scenes

CACHE = Path(os.environ.get("LEAPFROG_CACHE", "runs/cache"))
WORLD_VERSION = 2
"""Raise it when a change of distill.data.scenes changes pictures, so that cached ones are not reused."""
HELD_OUT_SEED = 9_001
"""A stream of scenes that no training uses."""
CLIP_VERSION = 1
"""As WORLD_VERSION, of moving scenes."""
FPS = 8.0
_CHUNK = 256


def cached_array(
    name: str,
    shape: tuple[int, ...],
    dtype: type,
    fill: Callable[[int, int], NDArray[np.generic]],
    chunk: int = _CHUNK,
) -> NDArray[np.generic]:
    """A memory-mapped array ``CACHE/name.npy``, made chunk by chunk with ``fill(start, stop)`` if it is not there.

    The file appears under its name only when complete, so an interrupted run leaves nothing that looks whole.
    """
    path = CACHE / f"{name}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        for start in tqdm(range(0, shape[0], chunk), desc=name, unit="chunk", leave=False):
            stop = min(start + chunk, shape[0])
            array[start:stop] = fill(start, stop)
        array.flush()
        os.replace(temporary, path)
    loaded: NDArray[np.generic] = np.load(path, mmap_mode="r")
    return loaded


def scene_images(seed: int, count: int, size: int = 64, combinations: str = "trained") -> NDArray[np.uint8]:
    """Scenes 0 … count − 1 of a stream, rendered: (count, 3, size, size) uint8."""

    def fill(start: int, stop: int) -> NDArray[np.generic]:
        batch = [scenes.sample_scene(seed, i, combinations=combinations) for i in range(start, stop)]
        return scenes.render(batch, size).numpy()

    name = f"scenes-{combinations}-{seed}-{count}-{size}-v{WORLD_VERSION}"
    return cached_array(name, (count, 3, size, size), np.uint8, fill)  # type: ignore[return-value]


def scene_clips(seed: int, count: int, frames: int, size: int = 64, combinations: str = "trained") -> NDArray[np.uint8]:
    """Moving scenes 0 … count − 1 of a stream at FPS frames per second: (count, 3, frames, size, size) uint8."""

    def fill(start: int, stop: int) -> NDArray[np.generic]:
        moving = (scenes.sample_scene(seed, i, combinations=combinations, moving=True) for i in range(start, stop))
        return np.stack([scenes.render_clip(scene, frames, size, fps=FPS).numpy() for scene in moving])

    name = f"clips-{combinations}-{seed}-{count}-{frames}-{size}-v{CLIP_VERSION}"
    return cached_array(name, (count, 3, frames, size, size), np.uint8, fill, chunk=16)  # type: ignore[return-value]
