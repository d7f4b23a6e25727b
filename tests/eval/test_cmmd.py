"""CMMD against all pairs one by one, its closed form for Gaussians, its direction, and its zero."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.cmmd import BANDWIDTH
from eval.metrics.extractors import Extractor
from eval.prompts import Prompt
from eval.statistics import gaussian_kernel, squared_discrepancy
from tests.eval.pictures import Fixed


class Pixels(nn.Module):
    """Features (B, 12): the pixels of a 2 × 2 picture, around zero."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() - 127.5


def pictures(count: int, seed: int, shift: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 200, (count, 3, 2, 2))
    images[:, 0] += shift
    return images.astype(np.uint8)


def score(ours: np.ndarray, theirs: np.ndarray, batch: int = 1000) -> Any:
    metric = create("cmmd", extractor=Extractor("pixels", Pixels(), "0"), reference=Fixed(theirs))
    for start in range(0, len(ours), batch):
        part = ours[start : start + batch]
        prompts = tuple(Prompt(f"p{start + i}", "a cube", i) for i in range(len(part)))
        metric.update(Samples(part, prompts))
    return metric.compute()


def test_value_is_the_mean_over_all_pairs_of_different_pictures() -> None:
    """One by one in float64, from the formula, with embeddings of length one."""
    ours, theirs = pictures(7, 0, shift=40), pictures(9, 1)
    x, y = (i.reshape(len(i), -1).astype(np.float64) - 127.5 for i in (ours, theirs))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(np.sum((a - b) ** 2)) / (2 * BANDWIDTH**2))

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert score(ours, theirs).value == pytest.approx(1000 * (sum(within) - 2 * across), rel=1e-6)


def test_discrepancy_of_gaussians_has_its_closed_form() -> None:
    """E k of N(0, 1) against N(m, 1) in one dimension is s/√(s² + 2)·exp(−m²/(2(s² + 2))), s the bandwidth."""
    s, m = 1.5, 1.0
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / 2000) for i in range(2000)])[:, None]
    found = squared_discrepancy(normal, normal + m, gaussian_kernel(s))
    width = s**2 + 2
    expected = 2 * s / math.sqrt(width) * (1 - math.exp(-(m**2) / (2 * width)))
    assert found == pytest.approx(expected, rel=0.01)


def test_the_same_distribution_is_at_zero_within_its_interval_and_damage_moves_away() -> None:
    truth = pictures(600, 1)
    values = [score(pictures(600, 2, shift=shift), truth) for shift in (0, 25, 55)]
    assert values[0].ci[0] < 0 < values[0].ci[1]
    assert values[0].value < values[1].value < values[2].value and values[1].ci[0] > 0


def test_batches_change_nothing_and_influences_are_centred() -> None:
    ours, theirs = pictures(50, 3, shift=20), pictures(60, 4)
    one, all_at_once = score(ours, theirs, batch=7), score(ours, theirs)
    assert one.value == pytest.approx(all_at_once.value, rel=1e-9)
    np.testing.assert_allclose(one.per_sample, all_at_once.per_sample)
    assert all_at_once.per_sample.sum() == pytest.approx(0, abs=1e-9)


def test_influence_is_what_one_more_copy_of_a_picture_changes() -> None:
    """n times the change of the biased statistic, to first order; the truth is held fixed."""
    ours, theirs = pictures(40, 5, shift=30), pictures(50, 6)
    whole = score(ours, theirs)

    def biased(images: np.ndarray, weights: np.ndarray) -> float:
        x, y = (i.reshape(len(i), -1).astype(np.float64) - 127.5 for i in (images, theirs))
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        kernel = gaussian_kernel(BANDWIDTH)
        return float(1000 * (weights @ kernel(x, x) @ weights - 2 * (weights @ kernel(x, y)).mean()))

    flat, step = np.full(40, 1 / 40), 1e-4
    changes = []
    for i in range(40):
        towards = step * (np.eye(40)[i] - flat)
        changes.append((biased(ours, flat + towards) - biased(ours, flat - towards)) / (2 * step))
    np.testing.assert_allclose(whole.per_sample, changes, rtol=1e-6, atol=1e-6)
