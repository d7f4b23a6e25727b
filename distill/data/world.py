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
MOTIONS = ("still", "left", "right", "towards", "away", "bounce", "orbit")
CAMERA_MOTIONS = ("still", "pan left", "pan right", "zoom in", "zoom out")
RELATIONS = ("left", "right", "front", "behind")

HELD_OUT = frozenset({("red", "cylinder"), ("blue", "cube"), ("green", "sphere"), ("yellow", "cylinder")})
"""(colour, shape) pairs that never appear in training; generalisation is measured on them."""

RADIUS = {"small": 0.47, "large": 0.80}
CLIP_SECONDS = 2.0
"""How long things move in the clips that the project trains on."""
GRAVITY = 6.0
"""Units per second², of what bounces: a bounce of T seconds rises to GRAVITY·T²/8."""
GROUND_HALF_WIDTH, GROUND_HALF_DEPTH = 1.75, 1.6
RELATION_MARGIN = 0.75
"""Two things are related along an axis when their centres differ by at least this many units on it."""
_DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "towards": (0, -1), "away": (0, 1)}
_CAMERA_DIRECTIONS = {"still": (0, 0), "pan left": (-1, 0), "pan right": (1, 0), "zoom in": (0, 1), "zoom out": (0, -1)}
_INSTANTS = 25
"""At which a way is looked at; between two of them nothing goes farther than 0.1 units."""
_P_MOTION = {"slide": 0.40, "bounce": 0.15, "orbit": 0.25, "camera": 0.20}
"""Of moving scenes; an orbit needs something to go around and room for it, otherwise something slides."""


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, where it stands (ground coordinates, units) and how it moves.

    speed: units per second along a direction, bounces per second, or radians per second around ``centre``, to the left
    where it passes in front.
    """

    shape: str
    colour: str
    size: str
    material: str
    x: float
    z: float
    yaw: float = 0.0
    motion: str = "still"
    speed: float = 0.0
    lift: float = 0.0
    centre: tuple[float, float] | None = None

    @property
    def radius(self) -> float:
        return RADIUS[self.size]

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return (self.size, self.colour, self.material, self.shape)

    def at(self, seconds: float) -> Thing:
        """This thing after ``seconds`` of its motion."""
        if self.motion == "bounce":
            since = seconds % (1 / self.speed)
            return replace(self, lift=GRAVITY / 2 * since * (1 / self.speed - since))
        if self.motion == "orbit":
            assert self.centre is not None
            (cx, cz), turn = self.centre, -self.speed * seconds
            x, z, cos, sin = self.x - cx, self.z - cz, math.cos(turn), math.sin(turn)
            return replace(self, x=cx + cos * x - sin * z, z=cz + sin * x + cos * z, yaw=self.yaw + turn)
        dx, dz = _DIRECTIONS[self.motion]
        return replace(self, x=self.x + dx * self.speed * seconds, z=self.z + dz * self.speed * seconds)


@dataclass(frozen=True)
class Scene:
    """One to three things, the azimuth of the light (radians), and how the camera stands and moves.

    pan: radians that the camera is turned to the right; zoom: its focal length over the usual one; camera_speed:
    radians per second, or e-folds of zoom per second. Half-way through a clip a moving camera stands as a still one.
    """

    things: tuple[Thing, ...]
    light: float = 0.0
    pan: float = 0.0
    zoom: float = 1.0
    camera: str = "still"
    camera_speed: float = 0.0

    @property
    def motion(self) -> str:
        """What moves, of MOTIONS and CAMERA_MOTIONS: the camera, the thing that does not stand still, or nothing."""
        if self.camera != "still":
            return self.camera
        return next((thing.motion for thing in self.things if thing.motion != "still"), "still")

    def at(self, seconds: float) -> Scene:
        """This scene after ``seconds`` of what moves in it."""
        pan, zoom = _CAMERA_DIRECTIONS[self.camera]
        way = self.camera_speed * (seconds - CLIP_SECONDS / 2)
        moved = tuple(thing.at(seconds) for thing in self.things)
        return replace(self, things=moved, pan=self.pan + pan * way, zoom=self.zoom * math.exp(zoom * way))


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
    moving: for two seconds exactly one thing moves, clear of the others and in view, or the camera does.
    """
    if combinations not in ("trained", "held_out"):
        raise ValueError(f"combinations is {combinations!r}; use 'trained' or 'held_out'")
    rng = np.random.default_rng((seed, index))
    number = count or int(rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3)))
    kinds = _sample_attributes(rng, number, combinations)
    radii = [RADIUS[kind[2]] for kind in kinds]
    positions, motion = None, None
    while positions is None or motion is None:
        positions = _place(rng, radii)
        if positions is not None:
            motion = _sample_motion(rng, positions, radii) if moving else _Motion()
    things = []
    for i, ((shape, colour, size, material), place) in enumerate(zip(kinds, positions, strict=True)):
        x, z = motion.start if i == motion.mover else place
        how = (motion.name, motion.speed, 0.0, motion.centre) if i == motion.mover else ()
        things.append(Thing(shape, colour, size, material, x, z, float(rng.uniform(0, math.pi / 2)), *how))
    light = float(rng.uniform(-0.35, 0.35))
    if motion.name not in CAMERA_MOTIONS[1:]:
        return Scene(tuple(things), light)
    return Scene(tuple(things), light, camera=motion.name, camera_speed=motion.speed)


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


@dataclass(frozen=True)
class _Motion:
    """What moves in a scene: the thing ``mover``, from ``start`` on, or the camera if there is no mover."""

    name: str = "still"
    speed: float = 0.0
    mover: int | None = None
    start: tuple[float, float] = (0.0, 0.0)
    centre: tuple[float, float] | None = None


def _sample_motion(
    rng: np.random.Generator, positions: list[tuple[float, float]], radii: list[float]
) -> _Motion | None:
    """One motion, on a way that is clear; None when the drawn mover has no clear way."""
    kind, mover = rng.choice(list(_P_MOTION), p=list(_P_MOTION.values())), int(rng.integers(len(positions)))
    pace = float(rng.random())
    if kind == "camera":
        name = str(rng.choice(CAMERA_MOTIONS[1:]))
        return _Motion(name, (0.05 + 0.04 * pace) if name.startswith("pan") else (0.13 + 0.07 * pace))
    start = positions[mover]
    if kind == "bounce":
        return _Motion("bounce", 1.0 + 0.6 * pace, mover, start)
    ways = [_Motion(name, 0.5 + 0.5 * pace, mover, start) for name in rng.permutation(MOTIONS[1:5]).tolist()]
    if kind == "orbit":
        others = [i for i in rng.permutation(len(positions)).tolist() if i != mover]
        ways = [_orbit(rng, mover, positions[i], radii[i] + radii[mover], pace) for i in others * 10] + ways
    return next((way for way in ways if _way_is_clear(way, positions, radii)), None)


def _orbit(rng: np.random.Generator, mover: int, centre: tuple[float, float], reach: float, pace: float) -> _Motion:
    """Around ``centre``, left or right, from anywhere, close by: RELATION_MARGIN is less than any ``reach``."""
    distance, angle = reach + float(rng.uniform(0.1, 0.4)), float(rng.uniform(0, 2 * math.pi))
    start = (centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle))
    return _Motion("orbit", float(rng.choice((-1.0, 1.0))) * (0.8 + 0.5 * pace), mover, start, centre)


def _way_is_clear(motion: _Motion, positions: list[tuple[float, float]], radii: list[float]) -> bool:
    """Whether a thing can move for CLIP_SECONDS without touching another or leaving the picture."""
    mover = motion.mover
    assert mover is not None
    thing = Thing("", "", "", "", *motion.start, 0.0, motion.name, motion.speed, 0.0, motion.centre)
    for seconds in np.linspace(0, CLIP_SECONDS, _INSTANTS):
        now = thing.at(float(seconds))
        if abs(now.x) > GROUND_HALF_WIDTH + 0.1 or abs(now.z) > GROUND_HALF_DEPTH + 0.1:
            return False
        for i, (x, z) in enumerate(positions):
            if i != mover and math.hypot(x - now.x, z - now.z) < radii[i] + radii[mover] + 0.06:
                return False
    return True
