"""FID and KID: closed form, torch-fidelity, direction, identity, independence of batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.extractors import Extractor, load_extractor
from eval.metrics.fid import bias_curve
from eval.metrics.references import Reference
from eval.prompts import Prompt
from eval.statistics import clustered_se, frechet_influence
from tests.eval.pictures import Fixed, Listed


class MeanColour(nn.Module):
    """Features (B, 3): the mean of each channel, so that Gaussian pictures give Gaussian features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def flat_pictures(count: int, mean: float, spread: float, seed: int) -> np.ndarray:
    """Pictures (count, 3, 4, 4) of one colour each, channels normal with exactly the given mean and spread."""
    normal = np.random.default_rng(seed).normal(size=(count, 3, 1, 1))
    colours = mean + spread * (normal - normal.mean(axis=0)) / normal.std(axis=0)
    return np.broadcast_to(colours.round().clip(0, 255).astype(np.uint8), (count, 3, 4, 4)).copy()


def textures(count: int, seed: int, brightness: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 200, (count, 3, 8, 8))
    return np.kron(images + brightness, np.ones((1, 1, 8, 8))).astype(np.uint8)


def as_samples(images: np.ndarray, first: int = 0) -> Samples:
    return Samples(images, tuple(Prompt(f"p{first + i}", "a red cube", i) for i in range(len(images))))


def fill(metric: Any, images: np.ndarray, batch: int) -> Any:
    for start in range(0, len(images), batch):
        metric.update(as_samples(images[start : start + batch], start))
    return metric.compute()


def test_fid_equals_the_closed_form_of_gaussians() -> None:
    """|Δμ|² + Σ(σa − σb)² = 3·10² + 3·(20 − 12)² = 492."""
    extractor = Extractor("mean-colour", MeanColour(), "0")
    reference = Fixed(flat_pictures(20_000, 120, 12, seed=0))
    score = fill(create("fid", extractor=extractor, reference=reference), flat_pictures(20_000, 130, 20, seed=1), 5000)
    assert score.value == pytest.approx(492, rel=0.002)
    assert score.ci[0] < 492 < score.ci[1]


@pytest.fixture
def extractor(judges_folder: Path) -> Extractor:
    return load_extractor(judges_folder, "scenes-clip")


def test_fid_and_kid_equal_torch_fidelity_on_the_same_pictures(extractor: Extractor) -> None:
    from torch_fidelity import calculate_metrics
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    ours, theirs = textures(120, 1, brightness=20), textures(150, 2)
    name = extractor.network.get_name()
    assert name in FEATURE_EXTRACTORS_REGISTRY
    expected = calculate_metrics(
        input1=Listed(ours),
        input2=Listed(theirs),
        feature_extractor=name,
        fid=True,
        kid=True,
        kid_subset_size=120,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    fid, kid = (fill(create(m, extractor=extractor, reference=Fixed(theirs)), ours, 40) for m in ("fid", "kid"))
    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_distance_grows_with_the_damage(extractor: Extractor, name: str) -> None:
    reference = Fixed(textures(150, 2))
    values = [
        fill(create(name, extractor=extractor, reference=reference), textures(150, 3, brightness=b), 64).value
        for b in (0, 20, 55)
    ]
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_distance_does_not_depend_on_the_batch_size(extractor: Extractor, name: str) -> None:
    reference, images = Fixed(textures(60, 2)), textures(50, 3)
    one, all_at_once = (fill(create(name, extractor=extractor, reference=reference), images, b) for b in (1, 50))
    assert one.value == pytest.approx(all_at_once.value, rel=1e-4)
    np.testing.assert_allclose(one.per_sample, all_at_once.per_sample, rtol=1e-3, atol=1e-4 * abs(one.per_sample).max())


def test_fid_of_the_reference_itself_is_zero(extractor: Extractor) -> None:
    images = textures(60, 2)
    assert fill(create("fid", extractor=extractor, reference=Fixed(images)), images, 60).value == pytest.approx(
        0, abs=1e-4
    )


def test_reference_is_held_out_and_kept_on_disk(
    extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.data.cache.CACHE", tmp_path)
    reference = Reference(7_900_001, 8)
    features = reference.features(extractor, 32)
    assert features.shape == (8, 12)
    np.testing.assert_array_equal(reference.features(extractor, 32), features)
    assert any("features-scenes" in path.name for path in tmp_path.iterdir())
    with pytest.raises(EvalError, match="may be a training stream"):
        Reference(1, 8)


def test_extractor_errors_name_the_way_out(judges_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="did you mean 'scenes-clip'"):
        create("fid", folder=judges_folder, extractor="scene-clip")
    with pytest.raises(EvalError, match=r"scenes-clip is missing"):
        create("fid", folder=tmp_path)


def test_too_few_or_odd_pictures_are_refused(extractor: Extractor) -> None:
    metric = create("fid", extractor=extractor, reference=Fixed(textures(10, 2)))
    with pytest.raises(EvalError, match="needs at least 2"):
        metric.compute()
    with pytest.raises(EvalError, match="squares of one size"):
        metric.update(as_samples(np.zeros((1, 3, 8, 16), np.uint8)))
    with pytest.raises(EvalError, match="uint8"):
        Samples(np.zeros((1, 3, 8, 8), np.float32), (Prompt("p", "a red cube", 0),))  # type: ignore[arg-type]


def test_the_curve_shows_the_bias_and_its_limit_is_nearer_to_the_truth() -> None:
    """Equal Gaussians of 12 dimensions: the truth is 0, and the bias falls as 1/n."""
    rng = np.random.default_rng(0)
    reference, features = rng.normal(size=(40_000, 12)), rng.normal(size=(1600, 12))

    def distance(part: np.ndarray) -> float:
        s = np.cov(part.T) @ np.cov(reference.T)
        means = float(np.sum((part.mean(0) - reference.mean(0)) ** 2))
        roots = np.sqrt(np.linalg.eigvals(s).real.clip(min=0)).sum()
        return means + float(np.trace(np.cov(part.T) + np.cov(reference.T)) - 2 * roots)

    curve = bias_curve(features, distance(features), distance)
    assert list(curve) == ["at 400", "at 800", "at 1600", "extrapolated"]
    assert curve["at 400"] > 1.5 * curve["at 800"] > 2.25 * curve["at 1600"]
    assert abs(curve["extrapolated"]) < curve["at 1600"] / 2
    assert bias_curve(features[:90], 1.0, distance) == {}, "fewer than 2·d samples in a part"


def test_fid_keeps_its_curve_with_the_score() -> None:
    extractor = Extractor("mean-colour", MeanColour(), "0")
    reference = Fixed(flat_pictures(4000, 120, 12, seed=0))
    score = fill(create("fid", extractor=extractor, reference=reference), flat_pictures(400, 130, 20, seed=1), 200)
    assert score.parts["at 400"] == pytest.approx(score.value)
    assert score.parts["extrapolated"] == pytest.approx(492, rel=0.05)


def grouped_gaussians(prompts: int, seeds: int, shared: float, rng: np.random.Generator) -> np.ndarray:
    """(prompts·seeds, 6) normal features of unit variance, of which pictures of one prompt share a part."""
    of_prompt = rng.normal(size=(prompts, 1, 6)) * np.sqrt(shared)
    own = rng.normal(size=(prompts, seeds, 6)) * np.sqrt(1 - shared)
    return (of_prompt + own).reshape(-1, 6)


def frechet(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """|Δμ|² + tr Σ + tr Σr − 2 tr (Σ Σr)^½."""
    sigma = np.cov(features.T)
    cross = np.sqrt(np.linalg.eigvals(sigma @ covariance).real.clip(min=0)).sum()
    return float(((features.mean(axis=0) - mean) ** 2).sum() + np.trace(sigma + covariance) - 2 * cross)


def jackknife_se(features: np.ndarray, blocks: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Delete-a-group jackknife: √((g − 1)/g · Σ (θ₋ᵢ − θ̄)²) over g blocks of whole prompts."""
    left_out = np.array([frechet(features[blocks != block], mean, covariance) for block in np.unique(blocks)])
    return float(np.sqrt((len(left_out) - 1) * left_out.var()))


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_the_influence_error_agrees_with_a_jackknife_over_blocks_of_prompts(shared: float) -> None:
    """20 blocks alone are uncertain by 1/√38 = 16 %, so means of 20 draws (3.6 %) must agree within 10 %."""
    rng, prompts, seeds, blocks = np.random.default_rng(5), 400, 4, 20
    mean, covariance = np.full(6, 0.3), np.diag(np.linspace(0.5, 1.5, 6))
    of_sample = np.arange(prompts).repeat(seeds)
    by_influence, by_jackknife = [], []
    for _ in range(20):
        features = grouped_gaussians(prompts, seeds, shared, rng)
        by_influence.append(clustered_se(frechet_influence(features, mean, covariance), of_sample.tolist()))
        by_jackknife.append(jackknife_se(features, of_sample % blocks, mean, covariance))
    assert np.mean(by_influence) == pytest.approx(np.mean(by_jackknife), rel=0.1)
