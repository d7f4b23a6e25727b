"""A quick look at a picture that is still being denoised: a linear map of the latents, without the decoder.

Each step's estimate of the clean latents x0 is mapped to RGB by the bundle's preview matrix M, fitted to its decoder:
rgb = x0ᵀ·M[:C] + M[C] in [-1, 1]. Latents are smaller than pixels, so the result is enlarged smoothly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from service.runtimes.base import Floats, Images

LARGEST = 256
"""Pixels of the longer side."""


def preview(x0: Floats, matrix: Sequence[Sequence[float]], size: tuple[int, int]) -> Images:
    """Pixels (H, W, 3) uint8 of latents x0 (C, h, w); ``size`` is the picture's (width, height), LARGEST a limit.

    Of a clip, (C, f, h, w), the frame in the middle.
    """
    if x0.ndim == 4:
        x0 = x0[:, x0.shape[1] // 2]
    m = np.asarray(matrix, dtype=np.float32)
    rgb = np.einsum("chw,cd->hwd", x0, m[:-1]) + m[-1]
    levels = np.clip(np.round((np.nan_to_num(rgb) + 1.0) * 127.5), 0, 255).astype(np.uint8)
    scale = min(1.0, LARGEST / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return np.asarray(Image.fromarray(levels).resize(small, Image.Resampling.BICUBIC))


def preview_steps(steps: int, wanted: int) -> dict[int, int]:
    """Index of the preview by number of steps done: ``wanted`` of them, spread evenly, never the last step."""
    chosen = sorted({min(max(1, round(k * steps / (wanted + 1))), steps - 1) for k in range(1, wanted + 1)} - {0})
    return {done: index for index, done in enumerate(chosen)}
