"""Smoothness in closed form: known energies, the floor of rounding, true clips, direction, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.data.scenes import render_clip
from distill.data.world import sample_scene
from eval.damage import damaged_clip
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.jerk import ROUNDING, energy, linear_smoothness, typical_energy
from eval.metrics.references import ClipReference
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import open_source


def levels(*values: int) -> np.ndarray:
    """One clip (1, F, 3, 4, 4) whose frames are of one level each."""
    return np.broadcast_to(np.array(values, np.uint8)[None, :, None, None, None], (1, len(values), 3, 4, 4)).copy()


def test_energy_is_that_of_the_second_differences() -> None:
    assert energy(levels(10, 20, 30, 40)) == 0, "even motion has none"
    assert energy(levels(10, 10, 20, 20)) == 100
    assert energy(levels(0, 255, 0)) == 510**2
    assert energy(levels(7, 7, 7)) == 0


def test_a_straight_line_between_frames_is_smooth_and_an_odd_frame_is_not() -> None:
    assert linear_smoothness(levels(10, 20, 30, 40, 50)) == 1
    assert linear_smoothness(levels(10, 71, 30, 40, 50)) == pytest.approx(1 - (51 + 0) / 2 / 255)
    assert linear_smoothness(levels(10, 20, 30, 99)) == 1, "a last frame without a partner is left out"


def test_half_a_level_is_what_rounding_leaves_of_smooth_motion() -> None:
    rng = np.random.default_rng(0)
    start, speed = rng.uniform(20, 60, (40, 1, 3, 8, 8)), rng.uniform(1, 9, (40, 1, 3, 8, 8))
    exact = start + speed * np.arange(17).reshape(1, -1, 1, 1, 1)
    assert energy(exact.round().astype(np.uint8)).mean() == pytest.approx(ROUNDING, rel=0.05)


@pytest.fixture(scope="module")
def truth() -> Samples:
    prompts = tuple(build_prompts(load_suite("scenes-wan-canary"), 12))
    return Samples(open_source("renders", frames=17).make(prompts), prompts)


@pytest.fixture(scope="module")
def typical(truth: Samples) -> dict[str, float]:
    """Of these very clips, so that they stand at nothing on the average."""
    found: dict[str, list[float]] = {}
    for prompt, level in zip(truth.prompts, np.log2(energy(truth.images) + ROUNDING), strict=True):
        assert prompt.scene is not None
        found.setdefault(prompt.scene.motion, []).append(float(level))
    return {motion: float(np.mean(some)) for motion, some in found.items()}


def score(made: Samples, typical: dict[str, float], damage: str | None = None, batch: int = 12) -> Score:
    images = made.images if damage is None else np.stack([damaged_clip(clip, damage) for clip in made.images])
    metric = create("jerk", reference=typical)
    for start in range(0, len(images), batch):
        metric.update(Samples(images[start : start + batch], made.prompts[start : start + batch]))
    return metric.compute()


def test_true_clips_are_near_nothing_and_every_damage_is_far(truth: Samples, typical: dict[str, float]) -> None:
    plain = score(truth, typical)
    assert plain.parts["balance"] == pytest.approx(0, abs=1e-6) and plain.value < 1
    frozen, shuffled, flickering = (
        score(truth, typical, f"frames-{damage}") for damage in ("frozen", "shuffled", "flickering")
    )
    assert min(frozen.value, shuffled.value, flickering.value) > 1 + plain.value
    assert frozen.parts["balance"] < -1 < 1 < min(shuffled.parts["balance"], flickering.parts["balance"])
    assert frozen.parts["linear smoothness"] == 1 > plain.parts["linear smoothness"]
    assert plain.parts["linear smoothness"] > flickering.parts["linear smoothness"]


def test_clips_run_backwards_are_as_smooth_and_batches_do_not_matter(truth: Samples, typical: dict[str, float]) -> None:
    plain = score(truth, typical)
    np.testing.assert_allclose(score(truth, typical, "frames-backwards").per_sample, plain.per_sample, atol=1e-6)
    np.testing.assert_allclose(score(truth, typical, batch=5).per_sample, plain.per_sample, atol=1e-6)


def test_the_reference_is_held_out_clips_by_their_motion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.cache.CACHE", tmp_path)
    found = typical_energy(ClipReference(7_980_000, 5, 5), 16)
    scenes = [sample_scene(7_980_000, i, moving=True) for i in range(5)]
    assert set(found) == {scene.motion for scene in scenes}
    clips = np.stack([render_clip(scene, 5, 16).transpose(0, 1).numpy() for scene in scenes])
    expected = np.log2(energy(clips) + 0.5)
    for motion, level in found.items():
        assert level == pytest.approx(np.mean([e for s, e in zip(scenes, expected, strict=True) if s.motion == motion]))


def test_what_cannot_be_compared_is_refused(truth: Samples, typical: dict[str, float]) -> None:
    with pytest.raises(EvalError, match="no true clip shows"):
        score(truth, {"still": 1.0})
    with pytest.raises(EvalError, match="says nothing of motion"):
        score(Samples(truth.images[:1], (Prompt("p", "a cat", 0),)), typical)
    with pytest.raises(EvalError, match="compares 17 frames and got 9"):
        create("jerk").update(Samples(truth.images[:1, :9], truth.prompts[:1]))
    with pytest.raises(EvalError, match="at least 3 frames"):
        create("jerk").update(Samples(truth.images[:1, 0], truth.prompts[:1]))
    with pytest.raises(EvalError, match="may be a training stream"):
        create("jerk", reference_seed=1)
