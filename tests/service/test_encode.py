"""Picture files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from service.encode import encode


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    """A smooth picture with some noise, (48, 64, 3)."""
    y, x = np.mgrid[0:48, 0:64]
    smooth = np.stack([x * 4, y * 5, 255 - x * 2], axis=-1)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def test_png_keeps_every_pixel_and_its_bytes(pixels: np.ndarray) -> None:
    data = encode(pixels, "png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert encode(pixels, "png") == data


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_quality_trades_size_for_closeness(pixels: np.ndarray, file_format: str) -> None:
    sizes, errors = [], []
    for quality in (10, 60, 95):
        data = encode(pixels, file_format, quality)  # type: ignore[arg-type]
        image = Image.open(io.BytesIO(data))
        assert image.format == file_format.upper()
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(image).astype(float) - pixels).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 4
