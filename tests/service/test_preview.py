"""Previews: the linear map, sizes, and the steps at which they are shown."""

from __future__ import annotations

import numpy as np
import pytest

from distill.bundle import Bundle, Manifest
from distill.sampling import noise
from service.preview import preview, preview_steps
from service.runtimes import OnnxRuntime
from service.settings import REPOSITORY

MATRIX = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.5))
"""Two channels and a constant: red, green, and a blue of 0.5."""


def test_colours_are_the_linear_map_of_the_latents() -> None:
    x0 = np.zeros((2, 4, 4), dtype=np.float32)
    x0[0, :, :2], x0[1, :, 2:] = 1.0, -1.0
    picture = preview(x0, MATRIX, (4, 4))
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [255, 128, 191]
    assert picture[3, 3].tolist() == [128, 0, 191]


def test_values_beyond_the_range_are_clipped_and_nan_is_grey() -> None:
    x0 = np.stack([np.full((1, 1), 9.0), np.full((1, 1), np.nan)]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        assert preview(x0[:1], ((1.0, 0.0, 0.0), (0.0, 0.0, 0.5)), (1, 1))[0, 0].tolist() == [255, 128, 191]
        assert preview(x0[1:], ((1.0, 0.0, 0.0), (0.0, 0.0, 0.5)), (1, 1))[0, 0].tolist() == [128, 128, 128]
    assert preview(np.full((2, 1, 1), -9.0, dtype=np.float32), MATRIX, (1, 1))[0, 0].tolist() == [0, 0, 191]


@pytest.mark.parametrize(("size", "shape"), [((64, 64), (64, 64)), ((1024, 512), (128, 256)), ((96, 64), (64, 96))])
def test_previews_are_as_large_as_the_picture_up_to_a_limit(size: tuple[int, int], shape: tuple[int, int]) -> None:
    assert preview(np.zeros((2, 16, 16), dtype=np.float32), MATRIX, size).shape == (*shape, 3)


@pytest.mark.parametrize(
    ("steps", "wanted", "shown"),
    [
        (1, 3, []),
        (2, 3, [1]),
        (4, 0, []),
        (4, 1, [2]),
        (4, 2, [1, 3]),
        (4, 3, [1, 2, 3]),
        (8, 1, [4]),
        (8, 3, [2, 4, 6]),
    ],
)
def test_previews_are_spread_over_the_steps(steps: int, wanted: int, shown: list[int]) -> None:
    assert list(preview_steps(steps, wanted)) == shown
    assert list(preview_steps(steps, wanted).values()) == list(range(len(shown)))


def test_previews_of_the_shipped_model_come_closer_to_the_picture() -> None:
    """Mean distance over a few seeds at four steps: 13, 14 and 8 levels; the second still moves things."""
    bundle = Bundle.open(REPOSITORY / "bundles" / "scenes-sdxl")
    runtime, manifest = OnnxRuntime(bundle, threads=1, max_batch=1), bundle.manifest
    table, size = manifest.samplers[4].table(), manifest.sizes[0]
    distances = np.zeros(3)
    for seed in range(3):
        text = runtime.encode_text([manifest.examples[seed]])
        draws = noise(seed, 0, manifest.latent_shape(size), draws=4)
        latents, shown = draws[:1], []
        for k in range(4):
            fresh = draws[k + 1 : k + 2] if k < 3 else np.zeros_like(latents)
            latents, x0 = runtime.step(latents, table.timesteps[k : k + 1], table.rows[k : k + 1], fresh, text)
            shown.append(preview(x0[0], manifest.preview, size).astype(float))
        picture = runtime.decode(latents)[0].astype(float)
        distances += [np.abs(picture - look).mean() for look in shown[:3]]
    assert distances[2] < 0.8 * min(distances[:2])


def test_the_preview_of_a_clip_is_the_frame_in_the_middle(manifest: Manifest) -> None:
    clip = np.random.default_rng(0).standard_normal((4, 5, 16, 16), dtype=np.float32)
    expected = preview(clip[:, 2], manifest.preview, (64, 64))
    np.testing.assert_array_equal(preview(clip, manifest.preview, (64, 64)), expected)
