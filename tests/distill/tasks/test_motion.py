"""The motion labeller's training: labels of mirrored and reversed clips, and what can be learned from a few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.data.scenes import project, render_clip
from distill.data.world import CAMERA_MOTIONS, CLIP_SECONDS, MOTIONS, Scene, Thing, sample_scene
from distill.motion import ANSWERS, MOVEMENTS, MotionLabeller, Movement
from distill.tasks.motion import MIRRORED, REVERSED, answers, varied

RED = Thing("sphere", "red", "small", "rubber", 0.3, 0.2)


def moving(name: str) -> Scene:
    if name in CAMERA_MOTIONS[1:]:
        return Scene((RED,), camera=name, camera_speed=0.1)
    return Scene((replace(RED, motion=name, speed=1.0, centre=(0.3, 1.2)),))


def way(scene: Scene) -> tuple[int, int]:
    """Where the thing goes in the picture: (right, down), each −1, 0 or 1."""
    moments = [scene.at(seconds) for seconds in (0.0, CLIP_SECONDS)]
    (u0, v0), (u1, v1) = (project(moment.things[0], moment) for moment in moments)
    return int(np.sign(round(u1 - u0, 1))), int(np.sign(round(v1 - v0, 1)))


@pytest.mark.parametrize("name", ["left", "right", "towards", "away", "pan left", "pan right"])
def test_labels_change_as_the_picture_does(name: str) -> None:
    right, down = way(moving(name))
    assert (right, down) != (0, 0)
    assert way(moving(MIRRORED.get(name, name))) == (-right, down)
    assert way(moving(REVERSED.get(name, name))) == (-right, -down)


def test_varied_flips_time_and_the_horizontal_axis_alone() -> None:
    clip = torch.arange(3 * 5 * 4 * 4).reshape(3, 5, 4, 4)
    truth = Movement("left", "cube", "red")
    same, label = varied(clip, truth, False, False)
    assert torch.equal(same, clip) and label == truth
    mirrored, label = varied(clip, truth, True, False)
    assert torch.equal(mirrored, clip.flip(3)) and label == Movement("right", "cube", "red")
    backwards, label = varied(clip, truth, False, True)
    assert torch.equal(backwards, clip.flip(1)) and label.motion == "right"
    both, label = varied(clip, truth, True, True)
    assert torch.equal(both, clip.flip(1, 3)) and label == truth


def test_truth_is_what_moves() -> None:
    scenes = [sample_scene(4, i, moving=True) for i in range(300)]
    for scene in scenes:
        truth = Movement.of(scene)
        movers = [t for t in scene.things if t.motion != "still"]
        assert truth.motion == scene.motion
        assert (truth.shape, truth.colour) == ((movers[0].shape, movers[0].colour) if movers else ("", ""))
    assert Movement.of(sample_scene(4, 0)) == Movement("still")
    classes = answers([Movement("zoom in"), Movement("orbit", "cube", "red")]).tolist()
    assert classes == [[MOVEMENTS.index("zoom in"), -1, -1], [MOTIONS.index("orbit"), 1, 1]]


def test_a_labeller_learns_to_tell_left_from_right_and_from_the_camera() -> None:
    torch.manual_seed(0)
    labeller = MotionLabeller(8)
    names = ("left", "right", "pan left", "pan right")
    clips = torch.stack([render_clip(moving(name), 9, 32, samples=1) for name in names])
    truth = answers([Movement.of(moving(name)) for name in names])
    optimizer = torch.optim.AdamW(labeller.parameters(), 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(labeller(clips.float() / 127.5 - 1)["motion"], truth[:, 0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert [found.motion for found in labeller.watch(clips)] == list(names)
    assert [found.shape == "" for found in labeller.watch(clips)] == [False, False, True, True]


def test_a_saved_labeller_says_the_same(tmp_path: object) -> None:
    labeller = MotionLabeller(8).half().float().eval()
    labeller.save(str(tmp_path), {"trained": 0.5})
    clips = torch.randint(0, 255, (3, 3, 9, 16, 16), dtype=torch.uint8)
    again = MotionLabeller.load(str(tmp_path))
    assert again.watch(clips) == labeller.watch(clips)
    assert {name: tuple(v.shape) for name, v in again(clips.float()).items()} == {n: (3, len(v)) for n, v in ANSWERS}
    with pytest.raises(ValueError, match=r"\(3, 3, 16, 16\) torch.uint8; give \(B, 3, F, H, W\)"):
        labeller.watch(clips[:, :, 0])
