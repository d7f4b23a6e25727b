"""Subject consistency: VBench's formula by hand and against its own loop, identity, direction, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.damage import damaged_clip
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.consistency import consistency
from eval.metrics.extractors import Extractor
from eval.prompts import Prompt


class MeanColour(nn.Module):
    """Features (B, 3): the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def score(clips: np.ndarray, batch: int = 64, folder: Path | None = None) -> Score:
    extractor = {"folder": folder} if folder else {"extractor": Extractor("mean-colour", MeanColour(), "0")}
    metric = create("subject-consistency", **extractor)
    for start in range(0, len(clips), batch):
        part = clips[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "a cube", i) for i in range(len(part)))))
    return metric.compute()


def test_right_angles_count_as_nothing_and_equal_frames_as_one() -> None:
    red, green = [1.0, 0, 0], [0, 1.0, 0]
    assert consistency(np.array([[red, red, red]])) == pytest.approx(1.0)
    assert consistency(np.array([[red, green]])) == pytest.approx(0.0)
    # Frame 2 is unlike both, frame 3 is like the second alone: (0 + 0 + 1 + 0)/4.
    assert consistency(np.array([[red, green, green]])) == pytest.approx(0.25)
    assert consistency(np.array([[red, [-1.0, 0, 0]]])) == 0, "floored at 0"


def test_it_equals_vbenchs_loop_over_frames() -> None:
    features = np.random.default_rng(0).normal(size=(7, 6, 5))
    for clip, found in zip(features, consistency(features), strict=True):
        total, unit = 0.0, nn.functional.normalize(torch.from_numpy(clip), dim=-1)
        for i in range(1, len(unit)):
            previous = max(0.0, nn.functional.cosine_similarity(unit[i - 1], unit[i], dim=0).item())
            first = max(0.0, nn.functional.cosine_similarity(unit[0], unit[i], dim=0).item())
            total += (previous + first) / 2
        assert found == pytest.approx(total / (len(unit) - 1), abs=1e-12)


def clips(count: int, drift: float) -> np.ndarray:
    """Frames of one colour each that walks by ``drift`` levels a frame."""
    rng = np.random.default_rng(1)
    colours = rng.uniform(60, 190, (count, 1, 3)) + drift * rng.normal(size=(count, 6, 3)).cumsum(1)
    frames = np.broadcast_to(colours.clip(0, 255)[..., None, None], (count, 6, 3, 4, 4))
    return frames.astype(np.uint8)


def test_it_falls_as_things_change_and_a_frozen_clip_has_all_of_it() -> None:
    values = [score(clips(30, drift)).value for drift in (0, 5, 15, 40)]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(1.0)
    frozen = np.stack([damaged_clip(clip, "frames-frozen") for clip in clips(8, 20)])
    assert score(frozen).value == pytest.approx(1.0, abs=1e-6)


def test_it_does_not_depend_on_the_batch_and_uses_the_embedded_clip(judges_folder: Path) -> None:
    made = np.random.default_rng(2).integers(0, 256, (5, 4, 3, 64, 64), dtype=np.uint8)
    one, whole = (score(made, batch, judges_folder) for batch in (1, 5))
    np.testing.assert_allclose(one.per_sample, whole.per_sample, atol=1e-6)
    assert whole.protocol["extractor"] == "scenes-clip" and len(whole.protocol["weights"]) == 64
