"""Distance of a runtime's pictures to the reference's: zero of itself, the closed form of a shift, per picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt
from eval.sources import open_source

PROMPTS = tuple(Prompt(f"p{i}", "a cube", i) for i in range(6))


class Flat:
    """Pictures of one level each: ten times the seed."""

    def make(self, prompts: Sequence[Prompt]) -> np.ndarray:
        levels = np.array([10 * prompt.seed for prompt in prompts], np.uint8)
        return np.tile(levels.reshape(-1, 1, 1, 1), (1, 3, 4, 4))


def score(images: np.ndarray, size: int = 6) -> tuple[float, np.ndarray]:
    metric = create("parity", reference=Flat())
    for start in range(0, 6, size):
        metric.update(Samples(images[start : start + size], PROMPTS[start : start + size]))
    found = metric.compute()
    return found.value, found.per_sample


def test_the_reference_is_at_zero_and_a_shift_is_its_size_either_way() -> None:
    images = Flat().make(PROMPTS)
    assert score(images)[0] == 0
    images[1] += 3
    images[2, 0] -= 3
    value, each = score(images)
    np.testing.assert_allclose(each, [0, 3, 1, 0, 0, 0])
    assert value == pytest.approx(4 / 6)
    assert score(images, size=4)[0] == value


def test_pictures_of_another_size_and_sources_that_are_no_bundle_are_refused() -> None:
    with pytest.raises(EvalError, match="export the bundle again"):
        score(np.zeros((6, 3, 8, 8), np.uint8))
    with pytest.raises(EvalError, match="measured of bundles and this is renders"):
        create("parity", source=open_source("renders"))
