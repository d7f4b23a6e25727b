"""Damage to a real exported bundle: each is known, repeatable, and said in the identity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from distill.bundle import Bundle
from eval.damage import CLIP_DAMAGES, DAMAGES, FLICKER, damaged, damaged_clip, drop_step, noised
from eval.errors import EvalError
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import BundleSource, Source, open_source


@pytest.fixture(scope="module")
def source(tiny_bundle: Path) -> BundleSource:
    return BundleSource(tiny_bundle, steps=4, threads=1, batch=4)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Four seeds of "a large purple cylinder"."""
    return build_prompts(load_suite("scenes-canary"), 12)[8:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage not in CLIP_DAMAGES])
def test_damage_changes_the_pictures_the_same_way_twice_and_is_named(
    damage: str, source: BundleSource, prompts: list[Prompt], folder: Path
) -> None:
    broken = damaged(source, damage, folder)
    made = broken.make(prompts)
    assert made.shape == (4, 3, 64, 64) and made.dtype == np.uint8
    assert not np.array_equal(made, source.make(prompts))
    np.testing.assert_array_equal(made[2:3], damaged(source, damage, folder).make(prompts[2:3]))
    assert broken.identity is not None and broken.identity["damage"] == damage
    assert source.identity is not None and "damage" not in source.identity and damage in broken.name


def test_what_each_damage_does(source: BundleSource, prompts: list[Prompt]) -> None:
    plain = source.make(prompts)
    np.testing.assert_array_equal(damaged(source, "channels-swapped").make(prompts), plain[:, [2, 1, 0]])
    one = damaged(source, "seed-ignored").make(prompts)
    assert len({prompt.id for prompt in prompts}) == 1 and all(np.array_equal(one[0], picture) for picture in one)
    blurred = damaged(source, "blurred").make(prompts)
    assert blurred[0, 0, 5, 7] == (int(plain[0, 0, 4:7, 6:9].sum()) + 4) // 9
    assert blurred.astype(float).std() < plain.astype(float).std()


@pytest.mark.parametrize("damage", CLIP_DAMAGES)
def test_damage_to_clips_is_known_repeatable_and_leaves_the_clip_alone(damage: str) -> None:
    frames = np.random.default_rng(0).integers(0, 240, (6, 3, 4, 4), dtype=np.uint8)
    kept = frames.copy()
    broken = damaged_clip(frames, damage, seed=3)
    np.testing.assert_array_equal(frames, kept)
    np.testing.assert_array_equal(broken, damaged_clip(frames, damage, seed=3))
    if damage == "frames-frozen":
        assert all(np.array_equal(frame, frames[0]) for frame in broken)
    elif damage == "frames-shuffled":
        assert sorted(map(bytes, broken)) == sorted(map(bytes, frames))
        assert not any(np.array_equal(a, b) for a, b in zip(broken, frames, strict=True))
    elif damage == "frames-backwards":
        np.testing.assert_array_equal(broken, frames[::-1])
    else:
        np.testing.assert_array_equal(broken[::2], frames[::2])
        np.testing.assert_array_equal(broken[1::2], frames[1::2] + FLICKER)


def test_a_still_has_no_frames_to_damage_and_unknown_damage_is_refused() -> None:
    with pytest.raises(EvalError, match="1 frames has no order"):
        damaged_clip(np.zeros((1, 3, 4, 4), np.uint8), "frames-frozen")
    with pytest.raises(EvalError, match="did you mean 'frames-frozen'"):
        damaged_clip(np.zeros((2, 3, 4, 4), np.uint8), "frame-frozen")


def test_noise_of_weights_has_its_stated_size_and_another_seed_draws_another() -> None:
    weights = np.random.default_rng(1).normal(0, 3, (300, 300))
    made = [noised(0.1, seed)(weights, np.random.default_rng(2)) for seed in (0, 0, 1)]
    assert (made[0] - weights).std() == pytest.approx(0.1 * weights.std(), rel=0.02)
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


class Asked:
    """A source that remembers what it was asked for."""

    name, identity = "asked", None

    def __init__(self) -> None:
        self.about: dict[str, object] = {}
        self.prompts: list[Prompt] = []

    def make(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.prompts += prompts
        return np.zeros((len(prompts), 3, 8, 8), np.uint8)


def test_an_ignored_prompt_keeps_its_seed_and_a_digit_is_never_the_right_one() -> None:
    asked = Asked()
    scenes, digits = build_prompts(load_suite("scenes-canary"), 40), build_prompts(load_suite("digits-canary"), 60)
    damaged(asked, "prompt-ignored").make([*scenes, *digits])
    for before, after in zip([*scenes, *digits], asked.prompts, strict=True):
        assert before.seed == after.seed and before.id == after.id
        assert before.label is None or before.label != after.label
    assert sum(a.text == b.text for a, b in zip(scenes, asked.prompts, strict=False)) <= 1


def test_a_dropped_mode_is_replaced_and_nothing_else() -> None:
    asked = Asked()
    scenes, digits = build_prompts(load_suite("scenes-canary"), 40), build_prompts(load_suite("digits-canary"), 20)
    damaged(asked, "mode-dropped").make([*scenes, *digits])
    for before, after in zip([*scenes, *digits], asked.prompts, strict=True):
        assert after.text == {"9": "4"}.get(before.text, before.text.replace("cylinder", "cube"))
        assert after.label == (4 if before.label == 9 else before.label) and after.key == before.key
    assert any("cylinder" in prompt.text for prompt in scenes)


def test_a_dropped_step_leaves_the_others_as_they_are(source: BundleSource) -> None:
    before, after = source.manifest.samplers[4], drop_step(source.manifest, 4).samplers[4]
    assert after.rows[2][2:] == (0.0, 1.0, 0.0)
    assert [after.rows[i] for i in (0, 1, 3)] == [before.rows[i] for i in (0, 1, 3)]
    assert after.timesteps == before.timesteps


def test_damaged_weights_are_a_valid_bundle_of_another_digest(source: BundleSource, folder: Path) -> None:
    damaged(source, "weights-noised", folder)
    copy = Bundle.open(folder / f"{source.path.name}-weights-noised")
    original = Bundle.open(source.path)
    assert copy.digest != original.digest
    changed = {name for name in original.manifest.files if copy.manifest.files[name] != original.manifest.files[name]}
    assert changed == {original.engine("step").file}


def test_damage_that_cannot_be_done_is_refused(source: BundleSource) -> None:
    renders: Source = open_source("renders")
    for where, damage, message in (
        (renders, "weights-noised", "needs the weights"),
        (source, "weights-noised", "has no folder"),
        (source, "weights-noise", "did you mean 'weights-noised'"),
    ):
        with pytest.raises(EvalError, match=message):
            damaged(where, damage)
