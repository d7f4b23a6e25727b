"""Diversity of seeds: closed form, identity, direction, symmetry, independence of batch size, a reference by hand."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor, nn

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.extractors import Extractor
from eval.prompts import Prompt


class MeanColour(nn.Module):
    """Features (B, 3): the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("mean-colour", MeanColour(), "0")


def score(extractor: Extractor, colours: np.ndarray, seeds: int, batch: int = 64) -> Score:
    """Of pictures of one colour each, seeds of them per prompt."""
    images = np.broadcast_to(colours.astype(np.uint8)[:, :, None, None], (len(colours), 3, 4, 4)).copy()
    metric = create("diversity", extractor=extractor)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        prompts = [Prompt(f"p{(start + i) // seeds}", "a cube", start + i) for i in range(len(part))]
        metric.update(Samples(part, tuple(prompts)))
    return metric.compute()


def test_right_angles_are_1_and_half_angles_their_cosine(extractor: Extractor) -> None:
    red, green, yellow = [200, 0, 0], [0, 200, 0], [200, 200, 0]
    assert score(extractor, np.array([red, green]), 2).value == pytest.approx(1.0)
    found = score(extractor, np.array([red, green, yellow]), 3)
    assert found.value == pytest.approx((1 + 2 * (1 - np.sqrt(0.5))) / 3)
    assert found.per_sample[2] == pytest.approx(1 - np.sqrt(0.5))


def test_equal_pictures_have_none_and_order_does_not_matter(extractor: Extractor) -> None:
    assert score(extractor, np.tile([10, 20, 30], (8, 1)), 4).value == pytest.approx(0.0, abs=1e-12)
    colours = np.random.default_rng(0).integers(1, 255, (12, 3))
    assert score(extractor, colours[[1, 0, 2, 3]], 4).value == pytest.approx(score(extractor, colours[:4], 4).value)


def test_it_falls_as_seeds_matter_less(extractor: Extractor) -> None:
    rng = np.random.default_rng(1)
    centres, spread = np.repeat(rng.integers(60, 190, (30, 3)), 4, axis=0), rng.normal(size=(120, 3))
    values = [score(extractor, (centres + s * spread).clip(0, 255), 4).value for s in (30, 10, 2, 0)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(0, abs=1e-12)


def test_it_equals_torch_cosine_similarity_pair_by_pair(extractor: Extractor) -> None:
    import torch

    colours = np.random.default_rng(2).integers(1, 255, (20, 3))
    rows = torch.from_numpy(colours.astype(np.float64)).view(5, 4, 3)
    pairs = [
        1 - torch.nn.functional.cosine_similarity(group[i], group[j], dim=0)
        for group in rows
        for i in range(4)
        for j in range(i)
    ]
    assert score(extractor, colours, 4).value == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-6)


def test_it_does_not_depend_on_the_batch(extractor: Extractor) -> None:
    colours = np.random.default_rng(3).integers(0, 255, (24, 3))
    one, many = score(extractor, colours, 4, batch=1), score(extractor, colours, 4, batch=24)
    np.testing.assert_allclose(one.per_sample, many.per_sample, atol=1e-6)
    assert one.interval.n == 6


def test_a_prompt_with_one_seed_is_refused(extractor: Extractor) -> None:
    with pytest.raises(EvalError, match="p1 has one"):
        score(extractor, np.zeros((3, 3)), 2)
