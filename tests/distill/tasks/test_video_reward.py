"""The video reward's training: what damages do to clips, captions that are wrong of them, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data.captions import true_of
from distill.data.scenes import render_clip
from distill.data.world import sample_scene
from distill.tasks.common import to_float
from distill.tasks.facts import scene_motions
from distill.tasks.video_reward import DAMAGES, damage, wrong_moving_caption


def clip() -> torch.Tensor:
    scene = next(s for i in range(99) if (s := sample_scene(0, i, moving=True)).motion in ("left", "right"))
    return to_float(render_clip(scene, 9, 32, samples=1))


def change(x: torch.Tensor) -> float:
    return float(torch.diff(x, dim=1).abs().mean())


def detail(x: torch.Tensor) -> float:
    return float(torch.diff(x, dim=3).abs().mean())


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_what_they_are_called(name: str) -> None:
    clean = clip()
    spoiled = DAMAGES[name](clean, 0.8, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert spoiled.shape == clean.shape and not torch.equal(spoiled, clean)
    if name == "frozen":
        assert torch.equal(spoiled[:, -1], spoiled[:, -3]) and change(spoiled) < change(clean)
    elif name == "shuffled":
        frames = {tuple(frame.flatten().tolist()) for frame in clean.unbind(1)}
        assert {tuple(frame.flatten().tolist()) for frame in spoiled.unbind(1)} == frames
        assert change(spoiled) > change(clean)
    elif name == "blurred":
        assert detail(spoiled) < 0.8 * detail(clean)
    elif name == "smeared":
        assert torch.equal(spoiled[:, 0], clean[:, 0]) and change(spoiled) < change(clean)
    else:
        assert change(spoiled) > 2 * change(clean)


def test_any_damage_may_come_and_none_leaves_the_range() -> None:
    clean, rng, noise = clip(), np.random.default_rng(0), torch.Generator().manual_seed(0)
    spoiled = [damage(clean, rng, noise) for _ in range(30)]
    assert all(float(x.abs().amax()) <= 1.0 for x in spoiled)
    assert len({round(change(x), 4) for x in spoiled}) > 15


def test_wrong_captions_are_wrong_of_what_moves_or_of_the_things() -> None:
    rng, wrong_motion = np.random.default_rng(0), 0
    for i in range(400):
        scene = sample_scene(1, i, moving=True)
        caption = wrong_moving_caption(scene, rng)
        told = (caption.motion or (None, "still"))[1], caption.camera
        true = next((t.motion for t in scene.things if t.motion != "still"), "still"), scene.camera
        moves_otherwise = told != true
        assert moves_otherwise or not true_of(caption, scene)
        wrong_motion += moves_otherwise
    assert 150 < wrong_motion < 260


def test_motions_of_a_scene_come_from_left_to_right() -> None:
    for i in range(200):
        scene = sample_scene(1, i, moving=True)
        classes = scene_motions(scene)
        assert len(classes) == 4 and classes.count(-1) == 3 - len(scene.things)
        moving = [k for k, thing in enumerate(sorted(scene.things, key=lambda t: t.x)) if thing.motion != "still"]
        assert [k for k in range(3) if classes[k] > 0] == moving
        assert (classes[3] > 0) == (scene.camera != "still")
