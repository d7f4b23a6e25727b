"""Charts as inline SVG text: lines over iterations, and histograms over time. No scripts, fonts or other hosts.

Sizes are in units of a 360 wide view box, which fills a phone's width. Colours are CSS variables of the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from distill.telemetry.record import Series

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
COLOURS = 6
ROWS = 32


@dataclass(frozen=True)
class Axis:
    """A map from values to the view box, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log10(z) if self.log else z for z in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (v - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            powers = [10.0**n for n in range(first, last + 1)]
            return powers[:: -(-len(powers) // 5)] if len(powers) > 1 else [self.low, self.high]
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 4.5)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(
    series: Sequence[tuple[str, Series]], *, limits: Sequence[tuple[float, str]] = (), span: tuple[int, int]
) -> str:
    """A chart of several named series; limits are (value, "watch" or "bad"). A log axis where values span decades."""
    drawn = [(i, name, s) for i, (name, s) in enumerate(series) if len(s)]
    values = [y for _, _, s in drawn for y in s.y if math.isfinite(y)]
    if not values:
        return ""
    y = _value_axis(values, [value for value, _ in limits])
    x = Axis(span[0], max(span[1], span[0] + 1), LEFT, WIDTH - RIGHT)
    parts = [_frame(x, y)]
    for value, kind in limits:
        if y.low <= value <= y.high:
            parts.append(
                f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            )
    for i, name, s in drawn:
        points = [(x(a), y(b), a, b) for a, b in zip(s.x, s.y, strict=True) if math.isfinite(b)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)
        parts.append(f'<polyline class="c{i % COLOURS}" points="{path}"/>')
        parts += [
            f'<circle class="c{i % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="{2 if len(points) < 60 else 1}">'
            f"<title>{escape(name)}, iteration {n}: {number(v)}</title></circle>"
            for a, b, n, v in points
        ]
    label = ", ".join(name for _, name, _ in drawn)
    return _svg(parts, f"{label} over iterations")


def heat(histograms: Sequence[tuple[int, list[float | list[int]]]], name: str, *, span: tuple[int, int]) -> str:
    """Histograms over time: one column per interval, darker where more samples are."""
    if not histograms:
        return ""
    edges = [(float(h[0]), float(h[1])) for _, h in histograms]  # type: ignore[arg-type]
    low, high = min(a for a, _ in edges), max(b for _, b in edges)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    density = np.stack([rebin(h, low, high) for _, h in histograms], 1)[::-1]
    alpha = (255 * np.sqrt(density / density.max())).astype(np.uint8)
    pixels = np.zeros((*alpha.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (58, 110, 200), alpha
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    x = Axis(span[0], max(span[1], span[0] + 1), LEFT, WIDTH - RIGHT)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    image = (
        f'<image href="{uri}" x="{LEFT}" y="{TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated"/>'
    )
    return _svg([image, _frame(x, y)], f"histograms of {name} over iterations")


def rebin(
    histogram: Sequence[float | list[int]], low: float, high: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A histogram's counts, as shares of its samples, on ROWS equal bins of [low, high]; bins overlap in proportion."""
    start, stop, counts = float(histogram[0]), float(histogram[1]), np.array(histogram[2], dtype=np.float64)  # type: ignore[arg-type]
    cells = np.linspace(low, high, ROWS + 1)
    if stop <= start:
        rows = np.zeros(ROWS)
        rows[min(ROWS - 1, int((start - low) / (high - low) * ROWS))] = 1.0
        return rows
    edges = np.linspace(start, stop, len(counts) + 1)
    cumulative = np.concatenate(([0.0], np.cumsum(counts))) / max(counts.sum(), 1.0)
    return np.asarray(np.diff(np.interp(cells, edges, cumulative)))


def number(value: float) -> str:
    """Three significant digits, without an exponent where it can be avoided."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _value_axis(values: Sequence[float], limits: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    near = [v for v in limits if low - (high - low) <= v <= high + (high - low)]
    low, high = min([low, *near]), max([high, *near])
    if low > 0 and high / low > 30:
        return Axis(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return Axis(low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _frame(x: Axis, y: Axis) -> str:
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        anchor = "end" if x(tick) > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{number(tick)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], label: str) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inside}</svg>'
