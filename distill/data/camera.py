"""The camera of scenes: where rays go, where world points appear, and which pixels hold a thing.

It stands upright at one place. A scene may have it turned to the right by ``pan`` radians and its focal length times
``zoom``; a turn is applied to the world, which is then seen by the camera as it stands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EYE = (0.0, 4.1, -6.6)
_LOOK_AT = (0.0, 0.30, 0.05)
_SLOPE = math.tan(math.radians(37.0) / 2)
"""Half the width of the picture at distance 1, at zoom 1."""

Vector = tuple[Tensor, ...]
"""x, y and z as three tensors that broadcast against each other."""


def axes() -> tuple[tuple[float, ...], ...]:
    """Unit vectors right, up, forward of the camera, which has x to its right."""
    (cx, cy, cz), (tx, ty, tz) = EYE, _LOOK_AT
    assert cx == tx, "the camera looks along the z axis"
    length = math.hypot(ty - cy, tz - cz)
    y, z = (ty - cy) / length, (tz - cz) / length
    return (1.0, 0.0, 0.0), (0.0, z, -y), (0.0, y, z)


def turned(x: float, z: float, pan: float) -> tuple[float, float]:
    """A ground vector of the world as the camera has it that is turned to the right by ``pan``."""
    return math.cos(pan) * x - math.sin(pan) * z, math.sin(pan) * x + math.cos(pan) * z


def seen_at(x: float, z: float, pan: float) -> tuple[float, float]:
    """A ground point of the world in the frame of a camera that is turned to the right by ``pan``."""
    right, ahead = turned(x - EYE[0], z - EYE[2], pan)
    return right + EYE[0], ahead + EYE[2]


def appears(point: tuple[float, float, float], zoom: float = 1.0) -> tuple[float, float]:
    """Where a point of the camera's frame appears: (u, v) in [0, 1] from the left and the top of the picture."""
    offset = [part - eye for part, eye in zip(point, EYE, strict=True)]
    right, up, depth = (sum(a * b for a, b in zip(axis, offset, strict=True)) for axis in axes())
    scale = 0.5 * zoom / (depth * _SLOPE)
    return 0.5 + right * scale, 0.5 - up * scale


def directions(row: Tensor, column: Tensor, size: int, zoom: Tensor) -> Vector:
    """Rays through pixel centres, scaled to 1 along the camera's axis.

    row: (…, H, 1), column: (…, 1, W), zoom: (…, 1, 1).
    """
    _, up, forward = axes()
    slope = _SLOPE / zoom
    u, v = ((column + 0.5) / size * 2 - 1) * slope, (1 - (row + 0.5) / size * 2) * slope
    return u, forward[1] + up[1] * v, forward[2] + up[2] * v


def ground_points(row: Tensor, column: Tensor, size: int, zoom: Tensor) -> tuple[Tensor, Tensor]:
    """x and z at which rays through pixels meet the ground, in the camera's frame."""
    dx, dy, dz = directions(row, column, size, zoom)
    t = (EYE[1] / (-dy).clamp_min(1e-3)).clamp_max(40.0)
    return EYE[0] + t * dx, EYE[2] + t * dz


def window(points: Vector, size: int, zoom: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, H, 1) and columns (n, 1, W) of the pixels that hold the hulls of points (n, k). zoom: (n, 1)."""
    seen = torch.stack([part - eye for part, eye in zip(points, EYE, strict=True)], -1)
    right, up, depth = (seen @ torch.tensor(axes(), device=seen.device).T).unbind(-1)
    scale = zoom * (0.5 * size / (depth.clamp_min(0.1) * _SLOPE))
    return _span(0.5 * size - up * scale, size)[:, :, None], _span(0.5 * size + right * scale, size)[:, None, :]


def _span(corners: Tensor, size: int) -> Tensor:
    """Indices of equally many pixels per thing, inside the picture, that cover its points. (n, k) to (n, W)."""
    low, high = corners.amin(1), corners.amax(1)
    width = min(int((high - low).amax().ceil()) + 2, size)
    return (low - 1).floor().clamp(0, size - width)[:, None] + torch.arange(width, device=corners.device)
