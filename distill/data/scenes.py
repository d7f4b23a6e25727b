"""Scenes: a procedural, ray-traced, exactly labelled world of shaded spheres, cubes and cylinders.

Every scene is a pure function of ``(seed, index)``, so a data set is a range of integers: infinite, reproducible and
free of files. Pictures are rendered by one batched ray tracer (torch, CPU or GPU) at any size; clips are pictures of
a scene whose things move.

    python -m distill.data.scenes --out sheet.png            # a contact sheet with captions
    python -m distill.data.scenes --out sheet.webp --frames 17

World: x points right, y up, z away from the camera; the ground is y = 0; one unit is about 11 pixels of 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data import camera
from distill.data.camera import EYE, Vector
from distill.data.world import (
    COLOURS,
    HELD_OUT,
    MATERIALS,
    MOTIONS,
    RADIUS,
    RELATION_MARGIN,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    holds,
    relation,
    sample_scene,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "MATERIALS",
    "MOTIONS",
    "RADIUS",
    "RELATIONS",
    "RELATION_MARGIN",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "holds",
    "relation",
    "render",
    "render_clip",
    "sample_scene",
]

_RGB = {
    "gray": (0.45, 0.46, 0.48),
    "red": (0.80, 0.10, 0.09),
    "blue": (0.10, 0.22, 0.78),
    "green": (0.08, 0.52, 0.15),
    "brown": (0.42, 0.22, 0.08),
    "purple": (0.46, 0.14, 0.66),
    "cyan": (0.10, 0.68, 0.74),
    "yellow": (0.92, 0.78, 0.08),
}
_LIGHT_HALF_ANGLE = 0.11
_FADING = 2.0
"""How fast the dark under a thing fades as it rises, per unit."""
_NO_THING = (0.0, -1e3, 0.0, 0.0)
"""Stands in for a missing neighbour: far below the ground, where it shadows nothing."""


def render(scenes: list[Scene], size: int = 64, *, samples: int = 2, device: str = "cpu") -> Tensor:
    """Ray-trace scenes. Returns (B, 3, size, size) uint8 in [0, 255], sRGB.

    samples: anti-aliasing, samples² rays per pixel. Shadows are soft: their penumbra follows the light's angular
    size. Shading is Lambert plus Blinn highlights; metal mirrors a sky gradient and the ground.
    """
    if not scenes:
        raise ValueError("render got no scenes; give at least one")
    if size < 1 or samples < 1:
        raise ValueError(f"size is {size} and samples is {samples}; give at least 1 of each")
    chunk = max(1, 2**20 // (size * samples) ** 2)
    parts = [_render(scenes[i : i + chunk], size, samples, device) for i in range(0, len(scenes), chunk)]
    return torch.cat(parts)


def render_clip(scene: Scene, frames: int = 17, size: int = 64, *, fps: float = 8.0, samples: int = 2) -> Tensor:
    """Ray-trace a moving scene. Returns (3, frames, size, size) uint8."""
    return render([scene.at(i / fps) for i in range(frames)], size, samples=samples).transpose(0, 1)


def _render(scenes: list[Scene], size: int, samples: int, device: str) -> Tensor:
    """Things are traced and shaded at the samples of their own windows only, the smooth ground once per pixel.

    Radiance is laid out (3, samples², B·size²), so that averaging the samples of all pixels is one contiguous sum.
    """
    groups, pixels = _groups(scenes, device), len(scenes) * size**2
    ground = _ground(scenes, groups, size, device).view(3, 1, pixels)
    image = ground.repeat(1, samples**2, 1)
    hits = [_trace(group, size, samples, pixels) for group in groups]
    if hits:
        place, depth, colour = (torch.cat(parts, dim=-1) for parts in zip(*hits, strict=True))
        nearest = torch.full((samples**2 * pixels,), torch.inf, device=device)
        nearest.scatter_reduce_(0, place, depth, "amin")
        visible = torch.nonzero(depth <= nearest[place]).flatten()
        image.view(3, -1)[:, place[visible]] = colour[:, visible]
    levels = _srgb(image.mean(1)) * 255 + 0.5
    return levels.clamp(0, 255).to(torch.uint8).view(3, len(scenes), size, size).transpose(0, 1).contiguous()


def project(thing: Thing, scene: Scene | None = None) -> tuple[float, float]:
    """Where a thing's centre appears, by the camera as it stands or as the scene has it: (u, v) in [0, 1]."""
    pan, zoom = (scene.pan, scene.zoom) if scene else (0.0, 1.0)
    x, z = camera.seen_at(thing.x, thing.z, pan)
    return camera.appears((x, thing.lift + _box(thing)[1], z), zoom)


# --- things ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The things of one shape and size in a batch. Tensors are (n, 1, 1) to meet windows of pixels (n, H, W)."""

    shape: str
    scene: Tensor  # (n,) index of each thing's scene
    zoom: Tensor  # of each thing's scene
    centre: Vector
    half: Tensor  # cube half edge, cylinder or sphere radius
    height: Tensor  # half height
    cos: Tensor
    sin: Tensor
    rgb: Vector
    metal: Tensor  # 1 or 0
    shine: Tensor  # strength and exponent of the highlight
    sharpness: Tensor
    light: Vector  # unit vector to the light of the scene
    neighbours: tuple[tuple[Tensor, ...], ...]  # bounding spheres (x, y, z, radius) of the scene's other things


def _groups(scenes: list[Scene], device: str) -> list[_Group]:
    most = max(len(scene.things) for scene in scenes)
    rows: dict[tuple[str, str], list[tuple[int, tuple[float, ...]]]] = {}
    for index, scene in enumerate(scenes):
        boxes = [_box(thing) for thing in scene.things]
        places = [camera.seen_at(thing.x, thing.z, scene.pan) for thing in scene.things]
        light = _light(scene)
        for i, thing in enumerate(scene.things):
            near = zip(scene.things, boxes, places, strict=True)
            others = [_bounds(o, box, place) for j, (o, box, place) in enumerate(near) if j != i]
            others += [_NO_THING] * (most - len(scene.things))
            turn = (math.cos(thing.yaw + scene.pan), math.sin(thing.yaw + scene.pan))
            glint = 90.0 if thing.shape == "sphere" else 36.0
            finish = (1.0, 1.3, glint) if thing.material == "metal" else (0.0, 0.05, 12.0)
            row: tuple[float, ...] = (
                scene.zoom,
                places[i][0],
                thing.lift + boxes[i][1],
                places[i][1],
                *boxes[i],
                *turn,
                *_RGB[thing.colour],
                *finish,
                *light,
            )
            row += tuple(number for other in others for number in other)
            rows.setdefault((thing.shape, thing.size), []).append((index, row))
    return [_group(shape, members, device) for (shape, _), members in rows.items()]


def _group(shape: str, members: Sequence[tuple[int, tuple[float, ...]]], device: str) -> _Group:
    scene = torch.tensor([index for index, _ in members], device=device)
    data = torch.tensor([row for _, row in members], dtype=torch.float32, device=device)
    c = data.T[..., None, None].unbind()
    return _Group(
        shape,
        scene,
        zoom=c[0],
        centre=c[1:4],
        half=c[4],
        height=c[5],
        cos=c[6],
        sin=c[7],
        rgb=c[8:11],
        metal=c[11],
        shine=c[12],
        sharpness=c[13],
        light=c[14:17],
        neighbours=tuple(c[i : i + 4] for i in range(17, len(c), 4)),
    )


def _box(thing: Thing) -> tuple[float, float]:
    """Half width and half height."""
    radius = thing.radius
    return {"sphere": (radius, radius), "cube": (0.80 * radius, 0.80 * radius)}.get(
        thing.shape, (0.80 * radius, 0.88 * radius)
    )


def _bounds(thing: Thing, box: tuple[float, float], place: tuple[float, float]) -> tuple[float, float, float, float]:
    """The sphere that stands for a thing when it shadows another."""
    radius = box[0] * {"sphere": 1.0, "cube": 1.12, "cylinder": 1.06}[thing.shape]
    return place[0], thing.lift + box[1], place[1], radius


def _light(scene: Scene) -> tuple[float, float, float]:
    """The unit vector to the light, in the camera's frame."""
    azimuth = scene.light - 0.75
    y, (x, z) = 1.25, camera.turned(math.sin(azimuth), -0.72 * math.cos(azimuth), scene.pan)
    length = math.hypot(x, y, z)
    return x / length, y / length, z / length


def _hull(group: _Group) -> Vector:
    """World points (n, k) whose convex hull holds each thing, lifted points and those below them alike."""
    if group.shape == "sphere":
        points = [(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
    else:
        sides, outside = (4, math.sqrt(2)) if group.shape == "cube" else (8, 1 / math.cos(math.pi / 8))
        turns = [(i + 0.5) * 2 * math.pi / sides for i in range(sides)]
        points = [(outside * math.cos(t), y, outside * math.sin(t)) for t in turns for y in (-1.0, 1.0)]
    unit = torch.tensor(points, dtype=torch.float32, device=group.half.device)
    local = tuple(unit[:, i] * side for i, side in enumerate((group.half, group.height, group.half)))
    x, y, z = (part + centre for part, centre in zip(_to_world(group, local), group.centre, strict=True))
    return x[:, 0], y[:, 0], z[:, 0]


def _outline(group: _Group) -> Vector:
    """World points (n, k) that bound what the camera sees of each thing; a sphere's silhouette is nearly its disc."""
    if group.shape != "sphere":
        return _hull(group)
    right, up, _ = camera.axes()
    offsets = [[1.02 * (i * r + j * u) for i in (-1, 1) for j in (-1, 1)] for r, u in zip(right, up, strict=True)]
    unit = torch.tensor(offsets, device=group.half.device)
    x, y, z = (centre + part * group.half for part, centre in zip(unit, group.centre, strict=True))
    return x[:, 0], y[:, 0], z[:, 0]


def _to_local(group: _Group, v: Vector) -> Vector:
    return group.cos * v[0] + group.sin * v[2], v[1], group.cos * v[2] - group.sin * v[0]


def _to_world(group: _Group, v: Vector) -> Vector:
    return group.cos * v[0] - group.sin * v[2], v[1], group.cos * v[2] + group.sin * v[0]


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _slabs(origin: Tensor, direction: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / torch.where(direction.abs() < 1e-7, 1e-7, direction)
    middle, spread = -origin * inverse, half * inverse.abs()
    return middle - spread, middle + spread


def _interval(group: _Group, origin: Vector, ray: Vector) -> tuple[Tensor, Tensor]:
    """Ray parameters at which rays of the things' own frames enter and leave them; a miss has near > far.

    For a miss of something round the two still tell by how much, as the square root of a negative number would.
    """
    (ox, oy, oz), (dx, dy, dz) = origin, ray
    if group.shape == "cube":
        x0, x1 = _slabs(ox, dx, group.half)
        y0, y1 = _slabs(oy, dy, group.height)
        z0, z1 = _slabs(oz, dz, group.half)
        return torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1)
    if group.shape == "sphere":
        a, b, c = _dot(ray, ray), _dot(origin, ray), _dot(origin, origin) - group.half * group.half
    else:
        a, b, c = dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - group.half * group.half
    gap = b * b - a * c
    root = gap.abs().sqrt().copysign(gap)
    near, far = (-b - root) / a, (root - b) / a
    if group.shape == "sphere":
        return near, far
    y0, y1 = _slabs(oy, dy, group.height)
    return torch.maximum(near, y0), torch.minimum(far, y1)


def _trace(group: _Group, size: int, samples: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays meet the things: places in the batch's radiance (P,), depths (P,) and linear radiance (3, P)."""
    row, column = camera.window(_outline(group), size * samples, group.zoom[:, 0])
    ray = camera.directions(row, column, size * samples, group.zoom)
    origin = _to_local(group, tuple(eye - centre for eye, centre in zip(EYE, group.centre, strict=True)))
    near, far = _interval(group, origin, direction := _to_local(group, ray))
    found = torch.nonzero(((near < far) & (near > 0)).flatten()).flatten()
    colour = _surface(group, tuple(o + near * d for o, d in zip(origin, direction, strict=True)), ray)
    row, column = row.long(), column.long()
    sample = row % samples * samples + column % samples
    place = sample * pixels + group.scene[:, None, None] * size**2 + row // samples * size + column // samples
    return place.flatten()[found], near.flatten()[found], torch.stack([c.flatten()[found] for c in colour])


def _normal(group: _Group, point: Vector) -> Vector:
    """Outward unit normals at points of the surface, both in the things' own frames."""
    x, y, z = point[0] / group.half, point[1] / group.height, point[2] / group.half
    if group.shape == "sphere":
        return x, y, z
    if group.shape == "cube":
        ax, ay, az = x.abs(), y.abs(), z.abs()
        on_x, on_y = (ax >= ay) & (ax >= az), ay >= az
        return x.sign() * on_x, y.sign() * (on_y & ~on_x), z.sign() * ~(on_x | on_y)
    radius = (x * x + z * z).sqrt()
    side = radius > y.abs()
    scale = side / radius
    return x * scale, y.sign() * ~side, z * scale


def _cushioned(group: _Group, normal: Vector, point: Vector) -> Vector:
    """Normals of metal bent outwards over each face, so that a flat one mirrors a stretch of the sky and glints.

    Truly flat metal shows one level per face and cannot be told from rubber in a small picture.
    """
    bend = 0.65 * group.metal
    sides = (group.half, group.height, group.half)
    bent = tuple(n + bend * p / side for n, p, side in zip(normal, point, sides, strict=True))
    inverse = _dot(bent, bent).rsqrt()
    return tuple(part * inverse for part in bent)


def _surface(group: _Group, point: Vector, ray: Vector) -> Vector:
    """Linear radiance of things. point: on the surface, own frame; ray: from the camera, world, of any length."""
    normal = _to_world(group, _cushioned(group, _normal(group, point), point))
    world = _to_world(group, point)
    inverse = _dot(ray, ray).rsqrt()
    ray = (ray[0] * inverse, ray[1] * inverse, ray[2] * inverse)
    lit = _light_past_neighbours(group, tuple(p + c for p, c in zip(world, group.centre, strict=True)))
    light = group.light
    facing = _dot(normal, light).clamp_min(0) * lit
    along = _dot(ray, normal)
    # The half vector is light - ray, so its product with the normal and its length follow from three dot products.
    gloss = (
        group.shine
        * lit
        * ((_dot(normal, light) - along) * (2 - 2 * _dot(ray, light)).rsqrt()).clamp_min(0) ** group.sharpness
    )
    contact = 0.55 + 0.45 * (0.5 + 0.5 * point[1] / group.height).clamp(0, 1)
    ambient = (0.29 + 0.13 * normal[1]) * contact + 0.78 * facing
    mirror = ray[1] - 2 * along * normal[1]
    horizon = torch.sigmoid(9 * mirror)
    environment = 0.18 + horizon * (0.10 + 0.75 * mirror.clamp_min(0))
    streak = torch.exp(-40 * (mirror - 0.45) ** 2) * 0.45
    reflected = group.metal * (0.95 * environment + streak) * contact
    white = (1 + along).clamp(0, 1) ** 4 * reflected
    tinted = torch.where(group.metal > 0, reflected - white + 0.35 * facing, ambient)
    return tuple(channel * tinted + (white + gloss) for channel in group.rgb)


# --- light -----------------------------------------------------------------------------------------------------


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _light_past_neighbours(group: _Group, point: Vector) -> Tensor:
    """Light that reaches points past the bounding spheres of the scene's other things, in [0, 1]."""
    lit = torch.ones_like(point[0])
    for x, y, z, radius in group.neighbours:
        offset = (point[0] - x, point[1] - y, point[2] - z)
        along = -_dot(offset, group.light)
        closest = (_dot(offset, offset) - along * along).clamp_min(0).sqrt()
        hidden = _smooth(0.5 + 0.5 * (radius - closest) / (along.clamp_min(0.05) * _LIGHT_HALF_ANGLE))
        lit = lit * (1 - hidden * (along > 0))
    return lit


def _occlusion(group: _Group, point: Vector) -> Tensor:
    """How much of the light each thing hides from points, in [0, 1]: (n, H, W).

    The light is a disc of half angle _LIGHT_HALF_ANGLE. A ray's length inside the thing, or its clearance from it,
    over the disc's radius at that distance is mapped to a smooth penumbra.
    """
    offset = tuple(p - c for p, c in zip(point, group.centre, strict=True))
    along = -_dot(offset, group.light)
    spread = along.clamp_min(0.05) * _LIGHT_HALF_ANGLE
    if group.shape == "sphere":
        inside = group.half - (_dot(offset, offset) - along * along).clamp_min(0).sqrt()
    else:
        near, far = _interval(group, _to_local(group, offset), _to_local(group, group.light))
        inside = 0.5 * (far - near)
    return _smooth(0.5 + 0.5 * inside / spread) * (along > 0)


def _ground(scenes: list[Scene], groups: list[_Group], size: int, device: str) -> Tensor:
    """Linear radiance of the ground under every pixel, shadowed by the things: (3, B, size, size)."""
    x, z = _ground_of(scenes, size, device)
    lit = torch.ones(len(scenes) * size**2, device=device)
    for group in groups:
        place, shadow = _cast_shadow(group, size)
        lit.scatter_reduce_(0, place, 1 - shadow, "prod")
    lit = lit.view(len(scenes), size, size) * torch.tensor([_light(s)[1] for s in scenes], device=device)[:, None, None]
    open_sky = _open_sky(scenes, x, z)
    fade = 0.34 + 0.66 * torch.exp(-0.018 * (x * x + 0.8 * (z + 0.6) ** 2))
    key, sky = lit * (0.46 * fade), open_sky * (0.30 * fade)
    warm, cool = (1.0, 0.965, 0.90), (0.90, 0.96, 1.06)
    return torch.stack([key * w + sky * c for w, c in zip(warm, cool, strict=True)])


def _ground_of(scenes: list[Scene], size: int, device: str) -> tuple[Tensor, Tensor]:
    """x and z in the world under every pixel, (B, size, size), or (1, size, size) if all cameras stand alike."""
    views = [(scene.pan, scene.zoom) for scene in scenes]
    pans, zooms = torch.tensor(views if len({*views}) > 1 else views[:1], device=device)[:, :, None, None].unbind(1)
    pixels = torch.arange(size, device=device, dtype=torch.float32)
    x, z = camera.ground_points(pixels[:, None], pixels[None, :], size, zooms)
    if not pans.any():
        return x, z
    right, ahead = x - EYE[0], z - EYE[2]
    return EYE[0] + pans.cos() * right + pans.sin() * ahead, EYE[2] + pans.cos() * ahead - pans.sin() * right


def _cast_shadow(group: _Group, size: int) -> tuple[Tensor, Tensor]:
    """Where in the batch's pixels things shadow the ground (P,), and how much of the light they hide there (P,)."""
    x, y, z = _hull(group)
    lx, ly, lz = (part[:, 0] for part in group.light)
    foot_x, foot_z = x - lx * y / ly, z - lz * y / ly
    blur = 3 * _LIGHT_HALF_ANGLE * y / ly
    edges = [
        (torch.cat((foot_x + i * blur, x), 1), torch.cat((foot_z + j * blur, z), 1)) for i in (-1, 1) for j in (-1, 1)
    ]
    all_x, all_z = (torch.cat(parts, 1) for parts in zip(*edges, strict=True))
    row, column = camera.window((all_x, torch.zeros_like(all_x), all_z), size, group.zoom[:, 0])
    gx, gz = camera.ground_points(row, column, size, group.zoom)
    shadow = _occlusion(group, (gx, torch.zeros_like(gx), gz))
    place = (group.scene[:, None, None] * size + row.long()) * size + column.long()
    return place.flatten(), shadow.flatten()


def _open_sky(scenes: list[Scene], x: Tensor, z: Tensor) -> Tensor:
    """How much of the sky ground points see past the things that stand near: (B, H, W) in (0, 1]."""
    most = max(len(scene.things) for scene in scenes)
    spots = [
        [(t.x, t.z, _box(t)[1], 0.55 * math.exp(-_FADING * t.lift)) for t in scene.things]
        + [(1e3, 1e3, 1.0, 0.0)] * (most - len(scene.things))
        for scene in scenes
    ]
    open_sky = torch.ones(len(scenes), *x.shape[1:], device=x.device)
    for spot in torch.tensor(spots, device=x.device).unbind(1):
        at_x, at_z, height, depth = spot.T[..., None, None].unbind()
        reach = (x - at_x) ** 2 + (z - at_z) ** 2
        open_sky = open_sky * (1 - depth / (1 + (reach / (1.1 * height * height)) ** 2))
    return open_sky


def _srgb(linear: Tensor) -> Tensor:
    """Filmic shoulder, then the sRGB curve (approximated by a power)."""
    toned = linear * (1 + linear * 0.22) / (1 + linear)  # Reinhard, extended
    return (toned * 1.55).clamp(0, 1) ** (1 / 2.2)


if __name__ == "__main__":
    from distill.data.sheet import main

    main()
