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
from dataclasses import dataclass

import torch
from torch import Tensor

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
_CAMERA = (0.0, 4.1, -6.6)
_LOOK_AT = (0.0, 0.30, 0.05)
_FIELD_OF_VIEW = math.radians(37.0)
_LIGHT_HALF_ANGLE = 0.11
_FAR = 1e9


def render(scenes: list[Scene], size: int = 64, *, samples: int = 2, device: str = "cpu") -> Tensor:
    """Ray-trace scenes. Returns (B, 3, size, size) uint8 in [0, 255], sRGB.

    samples: anti-aliasing, samples² rays per pixel. Shadows are soft: their penumbra follows the light's angular
    size. Shading is Lambert plus Blinn highlights; metal mirrors a sky gradient and the ground.
    """
    if not scenes:
        raise ValueError("render got no scenes; give at least one")
    chunk = max(1, 2**19 // (size * samples) ** 2)
    parts = [_render(scenes[i : i + chunk], size, samples, device) for i in range(0, len(scenes), chunk)]
    return torch.cat(parts)


def render_clip(scene: Scene, frames: int = 17, size: int = 64, *, fps: float = 8.0, samples: int = 2) -> Tensor:
    """Ray-trace a moving scene. Returns (3, frames, size, size) uint8."""
    return render([scene.at(i / fps) for i in range(frames)], size, samples=samples).transpose(0, 1)


def _rays(size: int, device: str) -> Tensor:
    """Unit directions through the pixel centres of a size × size image: (3, size²)."""
    camera, target = torch.tensor(_CAMERA), torch.tensor(_LOOK_AT)
    forward = torch.nn.functional.normalize(target - camera, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), forward), dim=0)
    up = torch.linalg.cross(forward, right)
    grid = ((torch.arange(size) + 0.5) / size * 2 - 1) * math.tan(_FIELD_OF_VIEW / 2)
    v, u = torch.meshgrid(-grid, grid, indexing="ij")
    rays = forward[:, None] + right[:, None] * u.reshape(1, -1) + up[:, None] * v.reshape(1, -1)
    return torch.nn.functional.normalize(rays, dim=0).to(device)


@dataclass
class _Batch:
    """Things of a batch as tensors; scene and slot tell where each stands. All (N,) but shape-wise index lists."""

    scene: Tensor
    centre: Tensor  # (N, 3)
    half: Tensor  # (N,) cube half edge, cylinder or sphere radius
    height: Tensor  # (N,) half height
    cos: Tensor
    sin: Tensor
    kinds: list[Tensor]  # indices per shape
    rgb: Tensor  # (N, 3)
    metal: Tensor  # (N,)


def _batch(scenes: list[Scene], device: str) -> _Batch:
    rows, owner, shape = [], [], []
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            r = thing.radius
            half = {"sphere": r, "cube": 0.80 * r, "cylinder": 0.80 * r}[thing.shape]
            height = {"sphere": r, "cube": 0.80 * r, "cylinder": 0.88 * r}[thing.shape]
            turn = thing.yaw
            rows.append(
                (thing.x, height, thing.z, half, height, math.cos(turn), math.sin(turn))
                + _RGB[thing.colour]
                + (float(thing.material == "metal"),)
            )
            owner.append(b)
            shape.append(SHAPES.index(thing.shape))
    data = torch.tensor(rows, dtype=torch.float32, device=device)
    shapes = torch.tensor(shape, device=device)
    return _Batch(
        scene=torch.tensor(owner, device=device),
        centre=data[:, :3],
        half=data[:, 3],
        height=data[:, 4],
        cos=data[:, 5],
        sin=data[:, 6],
        kinds=[torch.nonzero(shapes == k).flatten() for k in range(3)],
        rgb=data[:, 7:10],
        metal=data[:, 10],
    )


def _local(batch: _Batch, index: Tensor, origin: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    """Rays in the frames of the things ``index``: centred and turned. Components are (n, R)."""
    centre = batch.centre[index]
    ox, oy, oz = (origin[i] - centre[:, i, None] for i in range(3))
    dx, dy, dz = direction[0], direction[1], direction[2]
    cos, sin = batch.cos[index, None], batch.sin[index, None]
    return cos * ox + sin * oz, oy, cos * oz - sin * ox, cos * dx + sin * dz, dy, cos * dz - sin * dx


def _slabs(origin: Tensor, direction: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / torch.where(direction.abs() < 1e-7, 1e-7, direction)
    middle, spread = -origin * inverse, half * inverse.abs()
    return middle - spread, middle + spread


def _interval(batch: _Batch, kind: int, index: Tensor, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Ray parameters (near, far) at which rays enter and leave convex things; near > far is a miss. (n, R) each."""
    ox, oy, oz, dx, dy, dz = _local(batch, index, origin, direction)
    half, height = batch.half[index, None], batch.height[index, None]
    if kind == 1:
        x0, x1 = _slabs(ox, dx, half)
        y0, y1 = _slabs(oy, dy, height)
        z0, z1 = _slabs(oz, dz, half)
        return torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1)
    if kind == 0:
        a, b, c = 1.0, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - half * half
        gap = b * b - c
        root = gap.clamp_min(0).sqrt()
        miss = gap < 0
        return torch.where(miss, _FAR, -b - root), torch.where(miss, -_FAR, root - b)
    a = (dx * dx + dz * dz).clamp_min(1e-9)
    b, c = ox * dx + oz * dz, ox * ox + oz * oz - half * half
    gap = b * b - a * c
    root = gap.clamp_min(0).sqrt()
    y0, y1 = _slabs(oy, dy, height)
    near, far = torch.maximum((-b - root) / a, y0), torch.minimum((root - b) / a, y1)
    miss = gap < 0
    return torch.where(miss, _FAR, near), torch.where(miss, -_FAR, far)


def _normals(batch: _Batch, kind: int, thing: Tensor, point: Tensor) -> Tensor:
    """Outward unit normals of things of one kind at surface points. point: (3, P), thing: (P,). Returns (3, P)."""
    centre, half, height = batch.centre[thing].T, batch.half[thing], batch.height[thing]
    local = point - centre
    if kind == 0:
        return local / half
    cos, sin = batch.cos[thing], batch.sin[thing]
    x, y, z = cos * local[0] + sin * local[2], local[1], cos * local[2] - sin * local[0]
    if kind == 1:
        scaled = torch.stack((x / half, y / height, z / half))
        largest = scaled.abs().amax(0)
        face = torch.where(scaled.abs() >= largest - 1e-6, scaled.sign(), 0.0)
    else:
        side = (x * x + z * z).sqrt() / half > y.abs() / height
        face = torch.stack(
            (torch.where(side, x / half, 0.0), torch.where(side, 0.0, y.sign()), torch.where(side, z / half, 0.0))
        )
    face = torch.nn.functional.normalize(face, dim=0)
    return torch.stack((cos * face[0] - sin * face[2], face[1], cos * face[2] + sin * face[0]))


def _occlusion(batch: _Batch, thing: Tensor, kind: int, point: Tensor, light: Tensor) -> Tensor:
    """How much of the light a thing hides from points, in [0, 1]. thing: (n,), point: (3, R) or (n, 3, R).

    The light is a disc of half angle _LIGHT_HALF_ANGLE. A ray's length inside the thing, or its clearance from it,
    over the disc's radius at that distance is mapped to a smooth penumbra.
    """
    ox, oy, oz = (point[i] - batch.centre[thing, i, None] for i in range(3))
    lx, ly, lz = (light[thing_scene] for thing_scene, light in ((batch.scene[thing], light[:, i, None]) for i in range(3)))
    along = -(ox * lx + oy * ly + oz * lz)
    spread = along.clamp_min(0.05) * _LIGHT_HALF_ANGLE
    cx, cy, cz = ox + along * lx, oy + along * ly, oz + along * lz
    if kind == 0:
        clearance = (cx * cx + cy * cy + cz * cz).sqrt() - batch.half[thing, None]
        inside = -clearance
    else:
        half, height = batch.half[thing, None], batch.height[thing, None]
        cos, sin = batch.cos[thing, None], batch.sin[thing, None]
        ax, az, bx, bz = cos * ox + sin * oz, cos * oz - sin * ox, cos * lx + sin * lz, cos * lz - sin * lx
        y0, y1 = _slabs(oy, ly.expand_as(oy), height)
        if kind == 1:
            x0, x1 = _slabs(ax, bx.expand_as(ax), half)
            z0, z1 = _slabs(az, bz.expand_as(az), half)
            length = torch.minimum(torch.minimum(x1, y1), z1) - torch.maximum(torch.maximum(x0, y0), z0)
        else:
            a, b, c = bx * bx + bz * bz, ax * bx + az * bz, ax * ax + az * az - half * half
            gap = b * b - a * c
            root = gap.abs().sqrt() * gap.sign()
            length = torch.minimum((root - b) / a, y1) - torch.maximum((-b - root) / a, y0)
        inside = 0.5 * length
    soft = (0.5 + 0.5 * inside / spread).clamp(0, 1)
    return torch.where(along > 0, soft * soft * (3 - 2 * soft), 0.0)


def _render(scenes: list[Scene], size: int, samples: int, device: str) -> Tensor:
    batch = _batch(scenes, device)
    count, fine = len(scenes), size * samples
    rays = _rays(fine, device)
    pixels = rays.shape[1]
    camera = torch.tensor(_CAMERA, device=device)
    origin = camera[:, None].expand(3, 1)
    azimuth = torch.tensor([s.light for s in scenes], device=device) - 0.75
    light = torch.stack((azimuth.sin(), torch.full_like(azimuth, 1.25), -0.72 * azimuth.cos()), dim=1)
    light = torch.nn.functional.normalize(light, dim=1)  # (B, 3)

    depth = torch.full((count, pixels), _FAR, device=device)
    winner = torch.full((count, pixels), -1, dtype=torch.int32, device=device)
    for kind, index in enumerate(batch.kinds):
        if len(index) == 0:
            continue
        near, far = _interval(batch, kind, index, origin, rays)
        near = torch.where((near < far) & (near > 0), near, _FAR)
        for row, thing in enumerate(index.tolist()):
            scene = int(batch.scene[thing])
            closer = near[row] < depth[scene]
            depth[scene] = torch.where(closer, near[row], depth[scene])
            winner[scene] = torch.where(closer, thing, winner[scene])

    ground = _ground(batch, scenes, _rays(size, device), camera, light).view(3, count, size, 1, size, 1)
    image = ground.expand(3, count, size, samples, size, samples).reshape(3, count * pixels)
    hit = torch.nonzero(winner.flatten() >= 0).flatten()
    if len(hit):
        scene, pixel = hit // pixels, hit % pixels
        thing, t = winner.flatten()[hit].long(), depth.flatten()[hit]
        colour = _surface(batch, thing, scene, camera[:, None] + t * rays[:, pixel], rays[:, pixel], light)
        image[:, hit] = colour
    image = image.view(3, count, size, samples, size, samples).mean((3, 5)).transpose(0, 1)
    return (_srgb(image) * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def _ground(batch: _Batch, scenes: list[Scene], rays: Tensor, camera: Tensor, light: Tensor) -> Tensor:
    """Radiance of the ground under every ray, shadowed by the things: (3, B, R) linear."""
    t = (camera[1] / (-rays[1]).clamp_min(1e-3)).clamp_max(40.0)
    x, z = camera[0] + t * rays[0], camera[2] + t * rays[2]
    point = torch.stack((x, torch.zeros_like(x), z))
    lit = torch.ones(len(scenes), rays.shape[1], device=rays.device)
    open_sky = torch.ones_like(lit)
    for kind, index in enumerate(batch.kinds):
        if len(index) == 0:
            continue
        shadow = _occlusion(batch, index, kind, point, light)
        height = batch.height[index, None]
        reach = (x - batch.centre[index, 0, None]) ** 2 + (z - batch.centre[index, 2, None]) ** 2
        contact = 0.55 / (1 + (reach / (1.1 * height * height)) ** 2)
        for row, scene in enumerate(batch.scene[index].tolist()):
            lit[scene] *= 1 - shadow[row]
            open_sky[scene] *= 1 - contact[row]
    fade = torch.exp(-0.018 * (x * x + 0.8 * (z + 0.6) ** 2))
    key = 0.46 * light[:, 1, None] * lit
    sky = 0.30 * open_sky
    warm, cool = torch.tensor([1.0, 0.965, 0.90]), torch.tensor([0.90, 0.96, 1.06])
    shade = torch.stack([(key * float(w) + sky * float(c)) for w, c in zip(warm, cool, strict=True)])
    return shade * (0.34 + 0.66 * fade)


def _surface(batch: _Batch, thing: Tensor, scene: Tensor, point: Tensor, ray: Tensor, light: Tensor) -> Tensor:
    """Radiance of things at hit points. thing, scene: (P,), point, ray: (3, P). Returns (3, P) linear."""
    normal = torch.empty_like(point)
    shape_of = torch.empty(len(batch.scene), dtype=torch.long, device=point.device)
    for kind, index in enumerate(batch.kinds):
        shape_of[index] = kind
    shapes = shape_of[thing]
    for kind in range(3):
        where = torch.nonzero(shapes == kind).flatten()
        if len(where):
            normal[:, where] = _normals(batch, kind, thing[where], point[:, where])
    to_light = light[scene].T
    lit = _shadow_on_things(batch, thing, scene, point, to_light)
    metal, rgb = batch.metal[thing], batch.rgb[thing].T
    facing = (normal * to_light).sum(0).clamp_min(0)
    half = torch.nn.functional.normalize(to_light - ray, dim=0)
    gloss = (normal * half).sum(0).clamp_min(0)
    mirror = ray - 2 * (ray * normal).sum(0) * normal
    fresnel = (1 + (ray * normal).sum(0)).clamp(0, 1) ** 4
    up = 0.5 + 0.5 * normal[1]
    contact = 0.55 + 0.45 * (point[1] / (2 * batch.height[thing])).clamp(0, 1)
    ambient = (0.16 + 0.26 * up) * contact
    matte = rgb * (ambient + 0.78 * facing * lit) + 0.05 * gloss**12 * lit
    horizon = torch.sigmoid(9 * mirror[1])
    environment = (1 - horizon) * 0.30 + horizon * (0.46 + 0.50 * mirror[1].clamp_min(0))
    streak = torch.exp(-40 * (mirror[1] - 0.45) ** 2) * 0.35
    tint = rgb * (1 - fresnel) + fresnel
    polished = tint * (0.95 * environment + streak) * contact + rgb * 0.35 * facing * lit + 1.3 * gloss**90 * lit
    return torch.where(metal > 0.5, polished, matte)


def _shadow_on_things(batch: _Batch, thing: Tensor, scene: Tensor, point: Tensor, to_light: Tensor) -> Tensor:
    """Light that reaches hit points past the *other* things of their scene: (P,) in [0, 1]."""
    lit = torch.ones(point.shape[1], device=point.device)
    start = torch.searchsorted(batch.scene, torch.arange(int(batch.scene[-1]) + 2, device=point.device))
    shapes = torch.empty(len(batch.scene), dtype=torch.long, device=point.device)
    for kind, index in enumerate(batch.kinds):
        shapes[index] = kind
    for slot in range(3):
        other = start[scene] + slot
        valid = (other < start[scene + 1]) & (other != thing)
        for kind in range(3):
            where = torch.nonzero(valid & (shapes[other.clamp_max(len(shapes) - 1)] == kind)).flatten()
            if len(where):
                lit[where] *= 1 - _occlusion_at(batch, other[where], kind, point[:, where], to_light[:, where])
    return lit


def _occlusion_at(batch: _Batch, thing: Tensor, kind: int, point: Tensor, light: Tensor) -> Tensor:
    """As _occlusion for one thing per point: thing (P,), point and light (3, P). Bounding spheres suffice here."""
    offset = point - batch.centre[thing].T
    along = -(offset * light).sum(0)
    closest = (offset + along * light).norm(dim=0)
    radius = batch.half[thing] * (1.0, 1.12, 1.06)[kind]
    soft = (0.5 + 0.5 * (radius - closest) / (along.clamp_min(0.05) * _LIGHT_HALF_ANGLE)).clamp(0, 1)
    return torch.where(along > 0, soft * soft * (3 - 2 * soft), 0.0)


def _srgb(linear: Tensor) -> Tensor:
    """Filmic shoulder, then the sRGB curve (approximated by a power)."""
    toned = linear * (1 + linear * 0.22) / (1 + linear)  # Reinhard, extended
    return (toned * 1.55).clamp(0, 1) ** (1 / 2.2)
