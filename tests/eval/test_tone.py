"""Saturation, contrast and fine detail: closed form, reference implementation, identity, direction, batches."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from eval.errors import EvalError
from eval.metrics import Score, create
from eval.metrics.base import Samples
from eval.metrics.tone import Tone
from eval.prompts import Prompt
from tests.eval.pictures import Fixed

NAMES = ("saturation", "contrast", "high-frequency")


def pictures(count: int = 12, seed: int = 0) -> np.ndarray:
    """Smooth colour with some noise: (count, 3, 16, 16)."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(60, 180, (count, 3, 4, 4)), np.ones((1, 1, 4, 4)))
    return (coarse + rng.normal(0, 4, coarse.shape)).clip(0, 255).astype(np.uint8)


def scored(name: str, images: np.ndarray, truth: np.ndarray, batch: int = 5) -> Score:
    metric = create(name, reference=Fixed(truth))
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "", start + i) for i in range(len(part)))))
    return metric.compute()


def features(images: np.ndarray) -> np.ndarray:
    return np.asarray(Tone()(torch.from_numpy(images)), dtype=np.float64)


def test_closed_forms() -> None:
    """A red square; a wave of one cycle in two pixels is all fine, one in sixteen is all coarse."""
    red = np.zeros((1, 3, 16, 16), dtype=np.uint8)
    red[:, 0, :8] = 255
    waves = [np.round(127.5 + 100 * np.cos(2 * np.pi * np.arange(16) * f)) for f in (1 / 2, 1 / 16)]
    fine, coarse = (np.broadcast_to(wave, (1, 3, 16, 16)).astype(np.uint8) for wave in waves)
    grey = np.full((1, 3, 16, 16), 90, dtype=np.uint8)
    found = features(np.concatenate([red, fine, coarse, grey]))
    assert found[0, 0] == pytest.approx(0.5) and found[0, 1] == pytest.approx(0.2126 / 2, rel=1e-5)
    assert found[1:, 0] == pytest.approx(0)
    assert found[1, 2] == pytest.approx(1) and found[2, 2] == pytest.approx(0, abs=1e-4)
    assert found[3] == pytest.approx(0, abs=1e-6)


def test_they_equal_the_standard_librarys_colours_and_numpys_spectrum() -> None:
    images = pictures()
    found = features(images)
    for picture, (chroma, contrast, share) in zip(images / 255.0, found, strict=True):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in picture.reshape(3, -1).T]
        assert chroma == pytest.approx(np.mean([s * v for _, s, v in hsv]), rel=1e-5)
        light = np.tensordot([0.2126, 0.7152, 0.0722], picture, 1)
        assert contrast == pytest.approx(light.std(), rel=1e-5)
        energy = np.abs(np.fft.fft2(light - light.mean())) ** 2
        radius = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(16)[None])
        assert share == pytest.approx(energy[radius > 0.25].sum() / energy.sum(), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_itself_is_at_zero_and_order_does_not_matter(name: str) -> None:
    images = pictures()
    assert scored(name, images, images).value == pytest.approx(0, abs=1e-9)
    assert scored(name, images[::-1].copy(), pictures(seed=1)).value == pytest.approx(
        scored(name, images, pictures(seed=1)).value
    )


def test_both_sides_are_worse_and_the_parts_say_which() -> None:
    truth = pictures(40)
    middle = truth.mean(axis=(1, 2, 3), keepdims=True)
    grey = np.repeat(truth.mean(axis=1, keepdims=True), 3, axis=1).astype(np.uint8)
    vivid = (truth + 0.4 * (truth - truth.mean(axis=1, keepdims=True))).clip(0, 255).astype(np.uint8)
    faint = (middle + 0.5 * (truth - middle)).astype(np.uint8)
    noisy = (truth + np.random.default_rng(9).normal(0, 20, truth.shape)).clip(0, 255).astype(np.uint8)
    blurred = ((truth.astype(float) + np.roll(truth, 1, 2) + np.roll(truth, 1, 3)) / 3).astype(np.uint8)
    less, more = scored("saturation", grey, truth), scored("saturation", vivid, truth)
    assert less.value == pytest.approx(100) and less.parts["signed"] == pytest.approx(-100)
    assert more.parts["signed"] > 25 and more.value == more.parts["signed"]
    assert scored("contrast", faint, truth).parts["signed"] == pytest.approx(-50, abs=2)
    assert scored("high-frequency", noisy, truth).parts["signed"] > 50
    assert scored("high-frequency", blurred, truth).parts["signed"] < -20


@pytest.mark.parametrize("name", NAMES)
def test_batches_change_nothing_and_influence_is_the_derivative(name: str) -> None:
    images, truth = pictures(30, seed=2), pictures(30, seed=3)
    whole, parts = scored(name, images, truth, batch=30), scored(name, images, truth, batch=7)
    assert whole.value == pytest.approx(parts.value) and whole.per_sample == pytest.approx(parts.per_sample)
    assert whole.per_sample.sum() == pytest.approx(0, abs=1e-6) and whole.per_sample_kind == "influence"
    again = scored(name, np.concatenate([images, images[:1]]), truth)
    assert again.value - whole.value == pytest.approx(whole.per_sample[0] / 31, rel=1e-3, abs=1e-9)
    low, high = whole.ci
    assert low < whole.value < high


def test_a_reference_without_colour_is_refused() -> None:
    with pytest.raises(EvalError, match="with which nothing compares"):
        scored("saturation", pictures(), np.full((4, 3, 16, 16), 90, dtype=np.uint8))
