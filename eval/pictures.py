"""Pictures of finished runs, found again in the cache of generations by what made them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.prompts import Prompt
from eval.sources import CHUNK, cached
from eval.store import Store

Key = tuple[str, int]


def pictures(store: Store, run: dict[str, Any], cache: Path, keys: Iterable[Key]) -> dict[Key, NDArray[np.uint8]]:
    """(3, H, W) uint8 by (prompt id, seed); samples whose pictures are no longer there are left out."""
    identity = run["source"]["identity"]
    wanted = set(keys)
    if identity is None or not wanted:
        return {}
    digits = run["world"] == "digits"
    texts = store.texts(run["id"])
    prompts = [Prompt(key[0], text, key[1], label=int(text) if digits else None) for key, text in texts.items()]
    found: dict[Key, NDArray[np.uint8]] = {}
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        asked = [(i, prompt.key) for i, prompt in enumerate(chunk) if prompt.key in wanted]
        images = cached(cache, identity, chunk) if asked else None
        if images is not None:
            found |= {key: images[i] for i, key in asked}
    return found
