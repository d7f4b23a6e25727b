"""Scenes: exact labels, streams that keep held-out pairs apart, and pictures that show what the labels say."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data.scenes import project, render, render_clip
from distill.data.world import (
    CAMERA_MOTIONS,
    CLIP_SECONDS,
    COLOURS,
    GROUND_HALF_DEPTH,
    GROUND_HALF_WIDTH,
    HELD_OUT,
    MATERIALS,
    MOTIONS,
    RELATION_MARGIN,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    holds,
    relation,
    sample_scene,
)

STREAM = [sample_scene(0, i) for i in range(3_000)]
HELD = [sample_scene(0, i, combinations="held_out") for i in range(1_000)]
GROUND = Scene((Thing("cube", "red", "small", "rubber", x=500.0, z=0.0),))
"""A scene whose only thing is far out of the picture."""


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in scene.things}


def difference(scene: Scene, size: int = 64, **options: int) -> Tensor:
    """Where a scene's picture differs from the bare ground: (size, size) bool."""
    images = render([scene, GROUND], size, **options).int()  # type: ignore[arg-type]
    return (images[0] - images[1]).abs().amax(0) > 40


def centre(mask: Tensor) -> tuple[float, float]:
    """Mean row and column of a mask."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return float(rows.float().mean()), float(columns.float().mean())


# --- streams ---------------------------------------------------------------------------------------------------


def test_training_never_shows_a_held_out_pair() -> None:
    assert not any(pairs(scene) & HELD_OUT for scene in STREAM)


def test_the_held_out_stream_always_shows_exactly_one() -> None:
    for scene in HELD:
        assert sum((thing.colour, thing.shape) in HELD_OUT for thing in scene.things) == 1


def test_each_attribute_of_a_held_out_pair_is_seen_in_training() -> None:
    seen = set().union(*(pairs(scene) for scene in STREAM))
    assert seen == set(product(COLOURS, SHAPES)) - HELD_OUT


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    assert sample_scene(4, 9) == sample_scene(4, 9)
    assert len({sample_scene(seed, index) for seed in range(3) for index in range(50)}) == 150


def test_all_kinds_of_things_in_all_counts() -> None:
    things = [thing for scene in STREAM for thing in scene.things]
    for values, name in ((SHAPES, "shape"), (COLOURS, "colour"), (SIZES, "size"), (MATERIALS, "material")):
        assert {getattr(thing, name) for thing in things} == set(values)
    counts = np.bincount([len(scene.things) for scene in STREAM], minlength=4) / len(STREAM)
    np.testing.assert_allclose(counts, (0, 0.3, 0.4, 0.3), atol=0.03)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_count_can_be_chosen(count: int) -> None:
    assert {len(sample_scene(1, i, count=count).things) for i in range(50)} == {count}


def test_things_stand_apart_and_inside_the_ground() -> None:
    for scene in STREAM + HELD:
        for thing in scene.things:
            assert abs(thing.x) < GROUND_HALF_WIDTH
            assert abs(thing.z) < GROUND_HALF_DEPTH
        for a, b in combinations(scene.things, 2):
            assert math.hypot(a.x - b.x, a.z - b.z) > a.radius + b.radius


def test_an_unknown_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="combinations is 'test'; use 'trained' or 'held_out'"):
        sample_scene(0, 0, combinations="test")


# --- relations -------------------------------------------------------------------------------------------------


def test_every_two_things_are_clearly_related_and_the_relation_holds() -> None:
    opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
    for scene in STREAM:
        for a, b in combinations(scene.things, 2):
            name = relation(a, b)
            assert name is not None
            assert holds(name, a, b)
            assert relation(b, a) == opposite[name]
            assert not holds(opposite[name], a, b)


def test_things_that_are_close_on_both_axes_are_not_related() -> None:
    here = Thing("cube", "red", "small", "rubber", 0.0, 0.0)
    near = Thing("cube", "red", "small", "rubber", RELATION_MARGIN - 0.01, 0.1 - RELATION_MARGIN)
    assert relation(here, near) is None


@pytest.mark.parametrize(
    ("name", "x", "z"), [("left", -1.2, 0.0), ("right", 1.2, 0.0), ("front", 0.0, -1.2), ("behind", 0.0, 1.2)]
)
def test_relations_are_those_of_the_picture(name: str, x: float, z: float) -> None:
    """Left is left in the picture; what is in front is lower in it."""
    thing, other = (Thing("cube", "red", "small", "rubber", *at) for at in ((x, z), (0.0, 0.0)))
    assert relation(thing, other) == name
    (row, column), (other_row, other_column) = (centre(difference(Scene((t,)))) for t in (thing, other))
    seen = {"left": column < other_column, "right": column > other_column, "front": row > other_row}
    assert seen.get(name, row < other_row)


# --- pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 32, 65])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_any_size(size: int, samples: int) -> None:
    images = render(STREAM[:3], size, samples=samples)
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()


def test_pictures_of_all_sizes_show_the_same() -> None:
    small = render(STREAM[:8], 32, samples=4).float()
    large = torch.nn.functional.avg_pool2d(render(STREAM[:8], 128, samples=1).float(), 4)
    assert (small - large).abs().mean() < 1.5


def test_rendering_is_deterministic_and_free_of_its_batch() -> None:
    together = render(STREAM[:40])
    assert torch.equal(together, render(STREAM[:40]))
    assert torch.equal(together[7], render([STREAM[7]])[0])
    assert torch.equal(together[20:30], render(STREAM[20:30]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("material", MATERIALS)
def test_things_have_their_colour(shape: str, colour: str, material: str) -> None:
    scene = Scene((Thing(shape, colour, "large", material, 0.0, 0.0, yaw=0.4),))
    red, green, blue = render([scene])[0][:, difference(scene)].float().mean(1).tolist()
    assert {
        "gray": max(red, green, blue) - min(red, green, blue) < 20,
        "red": red > 1.4 * max(green, blue),
        "blue": blue > 1.3 * max(red, green),
        "green": green > 1.3 * max(red, blue),
        "brown": red > 1.1 * green > 1.2 * blue,
        "purple": blue > red > 1.2 * green,
        "cyan": min(green, blue) > 1.2 * red,
        "yellow": min(red, green) > 1.4 * blue and red < 1.3 * green,
    }[colour], (red, green, blue)


@pytest.mark.parametrize("shape", SHAPES)
def test_large_things_look_larger(shape: str) -> None:
    small, large = (int(difference(Scene((Thing(shape, "red", s, "rubber", 0, 0),))).sum()) for s in SIZES)
    assert large > 2 * small


def test_shapes_fill_their_boxes_differently() -> None:
    """A sphere's disc, a cube's hexagon and a cylinder's rounded column: three different silhouettes."""
    masks = [difference(Scene((Thing(shape, "red", "large", "rubber", 0, 0, yaw=0.7),))) for shape in SHAPES]
    for a, b in combinations(masks, 2):
        assert (a ^ b).sum() > 40


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_metal_can_be_told_from_rubber(shape: str, size: str) -> None:
    scenes = [Scene((Thing(shape, "red", size, material, 0, 0, yaw=0.4),)) for material in MATERIALS]
    rubber, metal = render(scenes).float()
    mask = difference(scenes[0])
    assert (rubber - metal).abs().mean(0)[mask].mean() > 8


def test_a_nearer_thing_hides_a_farther_one_in_either_order() -> None:
    front, back = (
        Thing("cube", "red", "large", "rubber", 0, -1.2),
        Thing("sphere", "green", "small", "rubber", 0, 1.0),
    )
    alone = render([Scene((front,))])[0]
    for things in ((front, back), (back, front)):
        image = render([Scene(things)])[0]
        middle = image[:, 34:48, 28:36].int() - alone[:, 34:48, 28:36].int()
        assert middle.abs().max() <= 6


def test_things_cast_a_soft_shadow_away_from_the_light() -> None:
    scene = Scene((Thing("sphere", "red", "large", "rubber", 0, 0),))
    images = render([scene, GROUND]).float()
    darker = (images[1] - images[0]).mean(0)
    grey = (images[0].amax(0) - images[0].amin(0)) < 20
    left, right = (darker * grey)[:, :28], (darker * grey)[:, 36:]
    assert right.max() > 30
    assert right.sum() > 3 * left.sum(), "the light stands on the left"
    assert len(set(right[right > 5].int().tolist())) > 15, "a penumbra has many levels"


def test_a_scene_without_visible_things_is_bare_ground() -> None:
    image = render([GROUND])[0].int()
    assert (image.amax(0) - image.amin(0)).max() < 30
    assert (image[:, 1:] - image[:, :-1]).abs().max() < 10


def test_nothing_to_render_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        render([])
    with pytest.raises(ValueError, match="size is 0"):
        render(STREAM[:1], 0)


# --- motion ----------------------------------------------------------------------------------------------------


def test_exactly_one_thing_or_the_camera_moves_in_a_moving_scene() -> None:
    moving = [sample_scene(0, i, moving=True) for i in range(1_000)]
    for scene in moving:
        movers = [thing for thing in scene.things if thing.motion != "still"]
        assert len(movers) + (scene.camera != "still") == 1
        assert scene.motion == (movers[0].motion if movers else scene.camera)
        assert scene.at(0.7) != scene.at(1.3)
    counts = Counter(scene.motion for scene in moving)
    assert counts.keys() == {*MOTIONS[1:], *CAMERA_MOTIONS[1:]} and min(counts.values()) > 25
    assert all(scene.motion == "still" and scene.at(1.0) == scene for scene in STREAM)


def test_moving_things_touch_nothing_and_stay_in_view() -> None:
    for index in range(500):
        scene = sample_scene(2, index, moving=True)
        for seconds in np.linspace(0, CLIP_SECONDS, 9):
            moment = scene.at(float(seconds))
            for a, b in combinations(moment.things, 2):
                assert math.hypot(a.x - b.x, a.z - b.z) > a.radius + b.radius
            assert all(abs(t.x) < GROUND_HALF_WIDTH + 0.2 for t in moment.things)
            assert all(abs(t.z) < GROUND_HALF_DEPTH + 0.2 for t in moment.things)
            assert all(0.05 < part < 0.95 for t in moment.things for part in project(t, moment))


@pytest.mark.parametrize("motion", MOTIONS[:5])
def test_motions_go_their_way_in_the_picture(motion: str) -> None:
    scene = Scene((Thing("sphere", "red", "small", "rubber", 0, 0, motion=motion, speed=0.8),))
    first, last = (centre(difference(moment)) for moment in (scene.at(0), scene.at(1)))
    down, right = last[0] - first[0], last[1] - first[1]
    assert {
        "still": (down, right) == (0, 0),
        "left": right < -4 and abs(down) < 1,
        "right": right > 4 and abs(down) < 1,
        "towards": down > 3 and abs(right) < 1,
        "away": down < -3 and abs(right) < 1,
    }[motion]


def test_what_bounces_leaves_the_ground_and_its_shadow_stays() -> None:
    thing = Thing("cube", "red", "small", "rubber", 0, 0, motion="bounce", speed=1.0)
    scene = Scene((thing,))
    lifts = [scene.at(t).things[0].lift for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert lifts == pytest.approx([0, 0.5625, 0.75, 0.5625, 0])
    ground, low, high = render([GROUND, scene.at(0.0), scene.at(0.5)]).int()
    red = [(image[0] - image[2]) > 40 for image in (low, high)]
    assert centre(red[0])[0] - centre(red[1])[0] > 6
    dark = [((ground - image).amin(0) > 20).sum() for image in (low, high)]
    assert min(dark) > 15, "it casts a shadow, wherever it is"


@pytest.mark.parametrize("speed", [1.2, -1.2])
def test_orbits_keep_their_distance_and_pass_in_front_to_the_left_if_positive(speed: float) -> None:
    in_front = Thing("sphere", "red", "small", "rubber", 0.2, -1.2, motion="orbit", speed=speed, centre=(0.2, 0.0))
    path = [in_front.at(t) for t in (0.0, 0.1, 1.0, math.tau / 1.2)]
    assert [math.hypot(t.x - 0.2, t.z) for t in path] == pytest.approx([1.2] * 4)
    assert (path[1].x < path[0].x) == (speed > 0)
    assert (path[3].x, path[3].z) == pytest.approx((0.2, -1.2))


@pytest.mark.parametrize("name", CAMERA_MOTIONS[1:])
def test_the_camera_moves_as_its_motion_says(name: str) -> None:
    """The world of a camera that turns right goes left in the picture; zooming in spreads it from the middle."""
    things = (Thing("sphere", "red", "small", "rubber", 1.0, 0.3), Thing("cube", "blue", "large", "rubber", -0.9, 0))
    scene = Scene(things, camera=name, camera_speed=0.08)
    first, last = scene.at(0), scene.at(CLIP_SECONDS)
    assert scene.at(CLIP_SECONDS / 2) == Scene(things, camera=name, camera_speed=0.08)
    (a, b), (c, d) = ([project(thing, moment) for thing in things] for moment in (first, last))
    apart = (c[0] - d[0]) / (a[0] - b[0])
    if name.startswith("pan"):
        assert (c[0] < a[0]) == (d[0] < b[0]) == (name == "pan right") and apart == pytest.approx(1, abs=0.05)
    else:
        assert apart == pytest.approx(math.exp(0.16 if name == "zoom in" else -0.16))
    for moment, (u, v) in ((first, a), (last, c)):
        image = render([moment])[0].int()
        row, column = centre((image[0] - image[2]) > 60)
        assert (column + 0.5) / 64 == pytest.approx(u, abs=0.02) and (row + 0.5) / 64 == pytest.approx(v, abs=0.03)


def test_turning_the_camera_or_the_world_around_it_is_the_same() -> None:
    """Highlights, shadows and neighbours turn along; the ground's own light stays with the ground."""
    scene = sample_scene(0, 11, count=3)
    turned = replace(scene, pan=0.06)
    far, near = render([turned, scene], 64, samples=3).int()
    shift = [project(t, turned)[0] - project(t, scene)[0] for t in scene.things]
    assert all(-0.15 < s < -0.04 for s in shift)
    moved = round(64 * float(np.mean(shift)))
    inner = (far[:, :, 12 + moved : 52 + moved] - near[:, :, 12:52]).abs().float()
    assert inner.mean() < 0.6 * (far[:, :, 12:52] - near[:, :, 12:52]).abs().float().mean()


def test_clips_are_pictures_of_moments() -> None:
    scene = sample_scene(0, 3, moving=True)
    clip = render_clip(scene, frames=5, size=32, fps=4.0)
    assert clip.shape == (3, 5, 32, 32)
    for frame in range(5):
        assert torch.equal(clip[:, frame], render([scene.at(frame / 4)], 32)[0])
    assert not torch.equal(clip[:, 0], clip[:, 4])
