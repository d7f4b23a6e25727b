"""Precision and recall: torch-fidelity, closed form, identity, direction and symmetry, independence of batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Score
from eval.metrics.extractors import Extractor
from eval.metrics.manifold import MOST, radii
from tests.eval.pictures import Fixed
from tests.eval.test_fid import MeanColour, as_samples


def colours(count: int, mean: float, spread: float, seed: int) -> np.ndarray:
    """Pictures (count, 3, 4, 4) of one colour each."""
    found = np.random.default_rng(seed).normal(mean, spread, (count, 3, 1, 1)).round().clip(0, 255)
    return np.broadcast_to(found.astype(np.uint8), (count, 3, 4, 4)).copy()


def score(name: str, ours: np.ndarray, theirs: np.ndarray, batch: int = 1000) -> Score:
    metric: Any = create(name, extractor=Extractor("mean-colour", MeanColour(), "0"), reference=Fixed(theirs))
    for start in range(0, len(ours), batch):
        metric.update(as_samples(ours[start : start + batch], start))
    found: Score = metric.compute()
    return found


def test_both_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.3, 1.0, (150, 5)), rng.normal(0.0, 1.2, (200, 5))
    expected = prc_features_to_metric(torch.from_numpy(ours), torch.from_numpy(theirs), verbose=False)
    for name in ("precision", "recall"):
        metric: Any = create(name, extractor=Extractor("mean-colour", MeanColour(), "0"))
        metric._clusters = [str(i) for i in range(150)]
        interval, per_sample = metric._distance(ours, theirs)
        assert interval.value == pytest.approx(100 * expected[name], rel=1e-6) and per_sample.shape == (150,)
        assert 20 < interval.value < 99


def test_radii_are_distances_to_the_third_neighbour() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0], [20.0]])
    np.testing.assert_allclose(radii(line), [49.0, 36.0, 16.0, 49.0, 361.0])


def test_a_set_covers_itself_and_a_far_one_covers_nothing() -> None:
    here, far = colours(100, 60, 5, 0), colours(100, 220, 5, 1)
    for name in ("precision", "recall"):
        assert score(name, here, here).value == 100.0
        assert score(name, here, far).value == 0.0


def test_narrow_sets_are_precise_and_wide_ones_recall() -> None:
    wide, narrow = colours(300, 120, 30, 0), colours(300, 120, 6, 1)
    assert score("precision", narrow, wide).value > 95 > score("precision", wide, narrow).value
    assert score("recall", wide, narrow).value > 60 > score("recall", narrow, wide).value
    assert score("recall", wide, narrow).value == score("precision", narrow, wide).value, "they mirror each other"


def test_a_mode_that_is_dropped_costs_recall_and_not_precision() -> None:
    both = np.concatenate([colours(150, 60, 8, 0), colours(150, 190, 8, 1)])
    one = colours(300, 60, 8, 2)
    assert score("precision", one, both).value > 90
    assert 30 < score("recall", one, both).value < 55


@pytest.mark.parametrize("name", ["precision", "recall"])
def test_batches_do_not_matter_and_the_reference_is_thinned(name: str) -> None:
    ours, theirs = colours(60, 120, 20, 0), colours(80, 125, 20, 1)
    one, many = score(name, ours, theirs, batch=1), score(name, ours, theirs, batch=60)
    assert one.value == many.value
    np.testing.assert_array_equal(one.per_sample, many.per_sample)
    assert one.protocol["reference at most"] == MOST and one.protocol["k"] == 3
    assert one.ci[0] <= one.value <= one.ci[1]
    with pytest.raises(EvalError, match="at least 5"):
        score(name, ours[:4], theirs)


def test_the_only_picture_that_covers_something_has_the_largest_influence_on_recall() -> None:
    """Five points far out: balls reach across, so each reference point out there is covered by one of them."""
    far = np.full((1, 3, 4, 4), 240, np.uint8)
    ours = np.concatenate([colours(60, 60, 6, 2), far])
    theirs = np.concatenate([colours(60, 60, 6, 0), far, far, far, far])
    found = score("recall", ours, theirs)
    assert found.per_sample.sum() == pytest.approx(0, abs=1e-9) and found.per_sample_kind == "influence"
    assert int(np.argmax(found.per_sample)) == 60
