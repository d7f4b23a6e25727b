"""Distances of clips: closed form, torch-fidelity, identity, direction, batches, and what the space sees of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.motion import MotionLabeller
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.extractors import Extractor, load_extractor
from eval.metrics.references import ClipReference
from eval.prompts import Prompt
from tests.eval.pictures import Fixed, Listed


class Pace(nn.Module):
    """Features (B, 3): how far each channel's mean goes from the first frame to the last."""

    def forward(self, clips: Tensor) -> Tensor:
        means = clips.float().mean(dim=(3, 4))
        return means[:, -1] - means[:, 0]


def moving_levels(count: int, pace: float, spread: float, seed: int) -> np.ndarray:
    """Clips (count, 3, 3, 4, 4) that brighten by normal amounts of exactly the given mean and spread per channel."""
    normal = np.random.default_rng(seed).normal(size=(count, 3))
    gain = pace + spread * (normal - normal.mean(axis=0)) / normal.std(axis=0)
    frames = 100 + gain[:, None] * np.linspace(0, 1, 3)[None, :, None]
    return np.broadcast_to(frames.round().clip(0, 255).astype(np.uint8)[..., None, None], (count, 3, 3, 4, 4)).copy()


def score(name: str, clips: np.ndarray, truth: Any, extractor: Extractor, batch: int = 64) -> Score:
    metric = create(name, extractor=extractor, reference=truth, frames=clips.shape[1])
    for start in range(0, len(clips), batch):
        part = clips[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "a cube", i) for i in range(len(part)))))
    return metric.compute()


def test_fvd_equals_the_closed_form_of_gaussians() -> None:
    """In deviations of the reference: |Δμ|² + Σ(σa − σb)² = 3·(15/7)² + 3·(12/7 − 1)² = 750/49."""
    extractor = Extractor("pace", Pace(), "0")
    truth = Fixed(moving_levels(6000, 40, 7, seed=0))
    found = score("fvd", moving_levels(6000, 55, 12, seed=1), truth, extractor, 3000)
    assert found.value == pytest.approx(750 / 49, rel=0.02) and found.ci[0] < 750 / 49 < found.ci[1]
    assert found.per_sample_kind == "influence" and found.smallest_n == 256


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    """The labeller of motion with random weights, through its folder."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    MotionLabeller(8).save(folder / "scenes-motion", {})
    return load_extractor(folder, "scenes-motion")


def textures(count: int, seed: int, drift: float = 2.0) -> np.ndarray:
    """Clips (count, 5, 3, 16, 16) of a coarse texture that moves to the right by ``drift`` pixels a frame."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 220, (count, 3, 4, 8)), np.ones((1, 1, 4, 4))).astype(np.uint8)
    places = (drift * np.arange(5)).round().astype(int)
    return np.stack([np.roll(coarse, place, axis=3)[..., :16] for place in places], axis=1)


def test_features_are_what_the_labeller_reads_its_answers_from(watched: Extractor) -> None:
    clips = textures(3, 0)
    labeller = watched.network.module.labeller
    seen = labeller.trunk(torch.from_numpy(clips).transpose(1, 2).float() / 127.5 - 1)
    np.testing.assert_allclose(watched(clips)[:, :32], seen.amax((2, 3, 4)), atol=1e-5)
    np.testing.assert_allclose(watched(clips)[:, 32:], seen.mean((2, 3, 4)), atol=1e-5)
    answers = labeller.read(torch.from_numpy(watched(clips)))
    expected = torch.cat(list(labeller(torch.from_numpy(clips).transpose(1, 2).float() / 127.5 - 1).values()), 1)
    np.testing.assert_allclose(answers, expected, atol=1e-4)


class Standardised(nn.Module):
    """The same features in deviations of those of given clips."""

    def __init__(self, watched: Extractor, clips: np.ndarray) -> None:
        super().__init__()
        self.module = watched.network.module
        features = torch.from_numpy(watched(clips))
        self.mean, self.deviation = features.mean(0), features.std(0, correction=0)

    def forward(self, clips: Tensor) -> Tensor:
        return (self.module(clips) - self.mean) / torch.where(self.deviation == 0, 1, self.deviation)


def test_fvd_and_kvd_equal_torch_fidelity_on_the_same_clips(watched: Extractor) -> None:
    from torch_fidelity import calculate_metrics

    ours, theirs = textures(120, 1, drift=1.0), textures(150, 2)
    scored = Extractor("standardised", Standardised(watched, theirs), "0")
    expected = calculate_metrics(
        input1=Listed(ours),
        input2=Listed(theirs),
        feature_extractor=scored.network.get_name(),
        fid=True,
        kid=True,
        kid_subset_size=120,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    fvd, kvd = (score(name, ours, Fixed(theirs), watched, 50) for name in ("fvd", "kvd"))
    assert fvd.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert kvd.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)


@pytest.mark.parametrize("name", ["fvd", "kvd"])
def test_frames_in_another_order_are_farther_although_each_frame_is_right(watched: Extractor, name: str) -> None:
    truth, clips = Fixed(textures(120, 2)), textures(120, 3)
    shuffled, frozen = clips[:, [3, 0, 4, 1, 2]], clips[:, [0] * 5]
    plain, *damaged = (score(name, some, truth, watched).value for some in (clips, shuffled, frozen))
    assert min(damaged) > 1.3 * plain


@pytest.mark.parametrize("name", ["fvd", "kvd"])
def test_it_does_not_depend_on_the_batch_and_the_truth_is_at_nothing(watched: Extractor, name: str) -> None:
    clips, truth = textures(40, 3), Fixed(textures(60, 2))
    one, whole = (score(name, clips, truth, watched, batch) for batch in (7, 40))
    assert one.value == pytest.approx(whole.value, rel=1e-3)
    np.testing.assert_allclose(one.per_sample, whole.per_sample, atol=2e-3 * abs(whole.per_sample).max())
    if name == "fvd":
        assert score(name, truth.images, truth, watched).value == pytest.approx(0, abs=1e-4)


def test_the_reference_is_held_out_clips_kept_on_disk(
    watched: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.data.cache.CACHE", tmp_path)
    reference = ClipReference(7_980_000, 3, 5)
    features = reference.features(watched, 16)
    assert features.shape == (3, 64) and any("features-clips" in path.name for path in tmp_path.iterdir())
    np.testing.assert_array_equal(features, reference.features(watched, 16))
    np.testing.assert_allclose(features, watched(reference.clips(16, 0, 3)), atol=1e-5)
    assert reference.protocol["frames"] == 5
    with pytest.raises(EvalError, match="may be a training stream"):
        ClipReference(1, 3, 5)


def test_clips_of_another_length_are_refused(watched: Extractor) -> None:
    metric = create("fvd", extractor=watched, reference=Fixed(textures(4, 2)), frames=9)
    with pytest.raises(EvalError, match="clips of 9 frames and got 5"):
        metric.update(Samples(textures(1, 0), (Prompt("p", "a cube", 0),)))
