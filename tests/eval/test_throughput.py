"""Pictures per second: the median of batches, and what cannot be timed."""

from __future__ import annotations

import numpy as np
import pytest

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt


def batch(first: int, count: int, seconds: float | None) -> Samples:
    prompts = tuple(Prompt(f"p{first + i}", "a cube", i) for i in range(count))
    return Samples(np.zeros((count, 3, 2, 2), np.uint8), prompts, None, seconds)


def test_the_median_leaves_out_the_warm_up_and_every_picture_carries_its_batchs_rate() -> None:
    metric = create("throughput")
    for number, seconds in enumerate((9.0, 9.0, 0.5, 0.4, 8.0)):
        metric.update(batch(4 * number, 4, seconds))
    score = metric.compute()
    assert score.value == 8.0 and score.n == 20 and score.direction == "higher"
    np.testing.assert_allclose(score.per_sample[8:16], [8.0] * 4 + [10.0] * 4)
    assert score.protocol == {"statistic": "median", "warm_up": 8, "batch": 4}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((4, 2, 4, 4), r"batches of \[2, 4\] pictures"), ((4, 4), "saw 2 samples and needs at least 3")],
)
def test_batches_of_several_sizes_or_too_few_are_refused(sizes: tuple[int, ...], message: str) -> None:
    metric = create("throughput")
    for size in sizes:
        metric.update(batch(0, size, 1.0))
    with pytest.raises(EvalError, match=message):
        metric.compute()


def test_pictures_from_the_cache_have_no_time() -> None:
    with pytest.raises(EvalError, match="cache: false"):
        create("throughput").update(batch(0, 4, None))
