"""Peak memory: the median of what new processes say, and of bundles only."""

from __future__ import annotations

import numpy as np
import pytest

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt
from eval.sources import open_source

PROMPTS = tuple(Prompt(f"p{i}", "a cube", i) for i in range(5))
SAMPLES = Samples(np.zeros((5, 3, 2, 2), np.uint8), PROMPTS)


def test_the_median_of_one_measurement_per_sample() -> None:
    metric = create("memory", measure=lambda prompt: 100.0 + 10 * prompt.seed)
    metric.update(SAMPLES)
    score = metric.compute()
    assert score.value == 120 and score.unit == "MiB" and score.direction == "lower"
    np.testing.assert_array_equal(score.per_sample, [100, 110, 120, 130, 140])


def test_only_a_bundle_has_memory_of_its_own() -> None:
    with pytest.raises(EvalError, match="measured of bundles and this is renders"):
        create("memory", source=open_source("renders"))
