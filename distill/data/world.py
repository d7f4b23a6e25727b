"""The world of scenes without its pictures: things, where they stand, how they relate and move. No torch.

Every scene is a pure function of ``(seed, index)``, so a data set is a range of integers: infinite, reproducible and
free of files. ``distill.data.scenes`` renders them, ``distill.data.captions`` describes them.

x points right, y up, z away from the camera; the ground is y = 0; one unit is about 11 pixels of 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("sphere", "cube", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
MOTIONS = ("still", "left", "right", "towards", "away")
RELATIONS = ("left", "right", "front", "behind")

HELD_OUT = frozenset({("red", "cylinder"), ("blue", "cube"), ("green", "sphere"), ("yellow", "cylinder")})
"""(colour, shape) pairs that never appear in training; generalisation is measured on them."""

RADIUS = {"small": 0.47, "large": 0.80}
CLIP_SECONDS = 2.0
"""How long things move in the clips that the project trains on."""
GROUND_HALF_WIDTH, GROUND_HALF_DEPTH = 1.75, 1.6
RELATION_MARGIN = 0.75
"""Two things are related along an axis when their centres differ by at least this many units on it."""
_DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "towards": (0, -1), "away": (0, 1)}


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, where it stands (ground coordinates, units) and how it moves."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    z: float
    yaw: float = 0.0
    motion: str = "still"
    speed: float = 0.0

    @property
    def radius(self) -> float:
        return RADIUS[self.size]

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return (self.size, self.colour, self.material, self.shape)

    def at(self, seconds: float) -> Thing:
        """This thing after ``seconds`` of its motion."""
        dx, dz = _DIRECTIONS[self.motion]
        return replace(self, x=self.x + dx * self.speed * seconds, z=self.z + dz * self.speed * seconds)


@dataclass(frozen=True)
class Scene:
    """One to three things and the azimuth of the light (radians)."""

    things: tuple[Thing, ...]
    light: float = 0.0

    def at(self, seconds: float) -> Scene:
        return replace(self, things=tuple(thing.at(seconds) for thing in self.things))


def relation(a: Thing, b: Thing) -> str | None:
    """How ``a`` stands to ``b`` along the axis on which they differ most; None when they are too close to say."""
    dx, dz = a.x - b.x, a.z - b.z
    if max(abs(dx), abs(dz)) < RELATION_MARGIN:
        return None
    if abs(dx) >= abs(dz):
        return "left" if dx < 0 else "right"
    return "front" if dz < 0 else "behind"


def holds(name: str, a: Thing, b: Thing) -> bool:
    """Whether ``a`` stands in relation ``name`` to ``b``: a signed difference on one axis, without margin."""
    dx, dz = a.x - b.x, a.z - b.z
    return {"left": dx < 0, "right": dx > 0, "front": dz < 0, "behind": dz > 0}[name]


def sample_scene(
    seed: int, index: int, *, count: int | None = None, combinations: str = "trained", moving: bool = False
) -> Scene:
    """Draw scene ``index`` of the stream ``seed``.

    count: how many things (1 to 3); None draws it with probabilities 0.3, 0.4, 0.3.
    combinations: "trained" never shows a pair of HELD_OUT; "held_out" shows at least one.
    moving: exactly one thing moves (0.5 to 1.0 units per second), for two seconds clear of the others and in view.
    """
    if combinations not in ("trained", "held_out"):
        raise ValueError(f"combinations is {combinations!r}; use 'trained' or 'held_out'")
    rng = np.random.default_rng((seed, index))
    number = count or int(rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3)))
    kinds = _sample_attributes(rng, number, combinations)
    radii = [RADIUS[kind[2]] for kind in kinds]
    positions, motions = None, None
    while positions is None or motions is None:
        positions = _place(rng, radii)
        if positions is not None:
            motions = _sample_motions(rng, positions, radii) if moving else [("still", 0.0)] * number
    things = []
    for (shape, colour, size, material), (x, z), motion in zip(kinds, positions, motions, strict=True):
        things.append(Thing(shape, colour, size, material, x, z, float(rng.uniform(0, math.pi / 2)), *motion))
    return Scene(tuple(things), light=float(rng.uniform(-0.35, 0.35)))


def _sample_attributes(rng: np.random.Generator, number: int, combinations: str) -> list[tuple[str, str, str, str]]:
    def draw(held_out: bool) -> tuple[str, str, str, str]:
        while True:
            shape, colour = SHAPES[rng.integers(3)], COLOURS[rng.integers(8)]
            if ((colour, shape) in HELD_OUT) == held_out:
                return shape, colour, SIZES[rng.integers(2)], MATERIALS[rng.integers(2)]

    kinds = [draw(combinations == "held_out")] + [draw(False) for _ in range(number - 1)]
    if number > 1 and combinations == "trained" and rng.random() < 0.08:
        kinds[1] = kinds[0]
    order = rng.permutation(number)
    return [kinds[i] for i in order]


def _place(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]] | None:
    """Positions at which no thing touches or hides another; None when 40 attempts for one thing fail."""
    placed: list[tuple[float, float]] = []
    for i, radius in enumerate(radii):
        for _ in range(40):
            x = float(rng.uniform(-1, 1)) * (GROUND_HALF_WIDTH - 0.5 * radius)
            z = float(rng.uniform(-1, 1)) * (GROUND_HALF_DEPTH - 0.5 * radius)
            clear = True
            for (px, pz), other in zip(placed, radii[:i], strict=False):
                dx, dz = x - px, z - pz
                distance, reach = math.hypot(dx, dz), radius + other
                taller = (other - radius) * math.copysign(1, dz)  # how much the nearer one outgrows the farther
                hidden = abs(dx) < 0.85 * reach and abs(dz) < reach + 0.45 + taller
                if distance < reach + 0.12 or hidden or max(abs(dx), abs(dz)) < RELATION_MARGIN:
                    clear = False
                    break
            if clear:
                placed.append((x, z))
                break
        else:
            return None
    return placed


def _sample_motions(
    rng: np.random.Generator, positions: list[tuple[float, float]], radii: list[float]
) -> list[tuple[str, float]] | None:
    """(motion, speed) of every thing: one moves, on a way that is clear; None when this one has no clear way."""
    mover, speed = int(rng.integers(len(positions))), float(rng.uniform(0.5, 1.0))
    for motion in rng.permutation(MOTIONS[1:]).tolist():
        if _way_is_clear(mover, motion, speed, positions, radii):
            return [(motion, speed) if i == mover else ("still", 0.0) for i in range(len(positions))]
    return None


def _way_is_clear(
    mover: int, motion: str, speed: float, positions: list[tuple[float, float]], radii: list[float]
) -> bool:
    """Whether a thing can move for CLIP_SECONDS without touching another or leaving the picture."""
    (x, z), (dx, dz) = positions[mover], _DIRECTIONS[motion]
    length = speed * CLIP_SECONDS
    if abs(x + dx * length) > GROUND_HALF_WIDTH + 0.1 or abs(z + dz * length) > GROUND_HALF_DEPTH + 0.1:
        return False
    for i, (px, pz) in enumerate(positions):
        nearest = min(max((px - x) * dx + (pz - z) * dz, 0.0), length)
        gap = math.hypot(px - x - dx * nearest, pz - z - dz * nearest)
        if i != mover and gap < radii[i] + radii[mover] + 0.05:
            return False
    return True
