"""Inception score: torch-fidelity, closed form, identity and symmetry, direction, independence of batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.inception import inception_score
from eval.prompts import Prompt


class Corner(nn.Module):
    """Logits (B, 4) from four pixels of the first channel: a classifier that a test can steer."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :4].float() / 20


def score(pixels: np.ndarray, batch: int = 64) -> Score:
    images = np.zeros((len(pixels), 3, 8, 8), np.uint8)
    images[:, 0, 0, :4] = pixels
    metric = create("inception-score", classifier=Corner())
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "1", i, label=1) for i in range(len(part)))))
    return metric.compute()


def test_it_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = np.random.default_rng(0).normal(size=(200, 10)) * 2
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=1)[KEY_METRIC_ISC_MEAN]
    assert inception_score(logits)[0] == pytest.approx(expected, rel=1e-9)


def test_sure_and_even_is_the_number_of_classes_and_one_class_or_no_idea_is_1() -> None:
    sure = np.eye(4)[np.arange(40) % 4] * 1000
    assert inception_score(sure)[0] == pytest.approx(4.0)
    assert inception_score(np.tile(sure[:1], (40, 1)))[0] == pytest.approx(1.0)
    assert inception_score(np.zeros((40, 4)))[0] == pytest.approx(1.0)


def test_it_does_not_depend_on_order_or_names_of_classes() -> None:
    logits = np.random.default_rng(1).normal(size=(50, 4))
    value = inception_score(logits)[0]
    assert inception_score(logits[::-1])[0] == pytest.approx(value)
    assert inception_score(logits[:, [2, 0, 3, 1]] + 5)[0] == pytest.approx(value)


def test_it_falls_with_certainty_and_with_classes_that_are_missing() -> None:
    sure = np.eye(4)[np.arange(80) % 4]
    values = [inception_score(sure * scale)[0] for scale in (8, 3, 1, 0)]
    assert values == sorted(values, reverse=True)
    assert inception_score((np.eye(4)[np.arange(80) % 2]) * 8)[0] < values[0] * 0.6


def test_influence_is_the_derivative_with_respect_to_a_samples_weight() -> None:
    logits = np.random.default_rng(2).normal(size=(30, 5)) * 2
    value, influence = inception_score(logits)
    assert influence.sum() == pytest.approx(0, abs=1e-9)
    repeats = 2000
    heavier = np.concatenate([np.tile(logits, (repeats, 1)), np.tile(logits[7:8], (30, 1))])
    share = 30 / len(heavier)  # the weight that moved to sample 7
    assert (inception_score(heavier)[0] - value) / share == pytest.approx(influence[7], rel=0.01)


def test_batches_do_not_matter_and_the_interval_holds_the_value() -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (40, 4))
    one, many = score(pixels, batch=1), score(pixels, batch=40)
    assert one.value == pytest.approx(many.value, rel=1e-6) and one.ci[0] < one.value < one.ci[1]
    np.testing.assert_allclose(one.per_sample, many.per_sample, rtol=1e-4, atol=1e-5)
