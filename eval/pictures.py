"""Pictures and clips of finished runs, found again in the cache of generations by what made them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.prompts import Prompt
from eval.sources import cached, chunk_size
from eval.store import Store

Key = tuple[str, int]


def pictures(store: Store, run: dict[str, Any], cache: Path, keys: Iterable[Key]) -> dict[Key, NDArray[np.uint8]]:
    """(3, H, W) uint8, of clips (F, 3, H, W), by (prompt id, seed); those that are no longer there are left out."""
    identity = run["source"]["identity"]
    wanted = set(keys)
    if identity is None or not wanted:
        return {}
    digits = run["world"] == "digits"
    texts = store.texts(run["id"])
    prompts = [Prompt(key[0], text, key[1], label=int(text) if digits else None) for key, text in texts.items()]
    found: dict[Key, NDArray[np.uint8]] = {}
    size = chunk_size(identity)
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        asked = [(i, prompt.key) for i, prompt in enumerate(chunk) if prompt.key in wanted]
        images = cached(cache, identity, chunk) if asked else None
        if images is not None:
            found |= {key: images[i] for i, key in asked}
    return found


def data_url(image: NDArray[np.uint8], fps: float = 8.0, *, side: int = 0) -> str:
    """PNG of a picture (3, H, W), or animated WebP of a clip (F, 3, H, W), without loss and for pages alone.

    side: enlarged by a whole factor to about so many pixels; 0 leaves it.
    """
    factor = max(1, round(side / image.shape[-2]))
    frames = image.reshape(-1, *image.shape[-3:]).repeat(factor, -2).repeat(factor, -1).transpose(0, 2, 3, 1)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    if image.ndim == 3:
        first.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def fps_of(run: dict[str, Any]) -> float:
    """Of a run's clips."""
    return float(run["source"]["about"].get("fps") or 8.0)
