"""Contact sheets of scenes with their captions: a PNG of stills, or an animated WebP of clips.

python -m distill.data.scenes --out sheet.png                       # the command; this module draws
python -m distill.data.scenes --out sheet.webp --frames 17
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from distill.data.cache import FPS
from distill.data.captions import describe
from distill.data.scenes import render, render_clip
from distill.data.world import Scene, sample_scene

_GAP, _MARGIN, _FONT_SIZE, _CAPTION_LINES = 10, 14, 11, 5
_PAPER, _INK = (250, 250, 248), (40, 40, 44)


def draw_sheet(images: NDArray[np.uint8], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures (B, H, W, 3) uint8 in rows of ``columns``, each above its caption."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 3
    cell_w, cell_h = width + _GAP, height + _CAPTION_LINES * line + _GAP
    sheet = Image.new("RGB", (2 * _MARGIN + columns * cell_w - _GAP, 2 * _MARGIN + rows * cell_h - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = _MARGIN + i % columns * cell_w, _MARGIN + i // columns * cell_h
        sheet.paste(Image.fromarray(image), (left, top))
        lines = textwrap.wrap(caption, int(width / (0.52 * _FONT_SIZE)), max_lines=_CAPTION_LINES, placeholder=" …")
        for k, text in enumerate(lines):
            draw.text((left + 1, top + height + 4 + k * line), text, _INK, font=font)
    return sheet


def _stills(scenes: list[Scene], size: int) -> NDArray[np.uint8]:
    return render(scenes, size, samples=4).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def _clips(scenes: list[Scene], size: int, frames: int) -> NDArray[np.uint8]:
    """(frames, B, size, size, 3) uint8."""
    clips = [render_clip(s, frames, size, fps=FPS, samples=3) for s in tqdm(scenes, desc="clips", leave=False)]
    return np.stack([clip.permute(1, 2, 3, 0).numpy() for clip in clips], axis=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distill.data.scenes",
        description="Draw a contact sheet of random scenes with captions; clips go into an animated WebP.",
        epilog="example: python -m distill.data.scenes --out sheet.webp --frames 17 --count 12 --columns 4",
    )
    parser.add_argument("--out", type=Path, required=True, help="sheet.png for stills, sheet.webp for clips")
    parser.add_argument("--frames", type=int, default=1, help="more than 1: clips of this many frames at 8 per second")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--size", type=int, default=176, help="pixels of each picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--combinations", choices=("trained", "held_out"), default="trained")
    args = parser.parse_args(arguments)
    moving = args.frames > 1
    if moving != (args.out.suffix == ".webp"):
        parser.error(f"--frames {args.frames} with --out {args.out}; clips need .webp, stills another ending")
    scenes = [sample_scene(args.seed, i, combinations=args.combinations, moving=moving) for i in range(args.count)]
    captions = [describe(scene, np.random.default_rng((args.seed, i))).text for i, scene in enumerate(scenes)]
    if moving:
        frames = [draw_sheet(f, captions, args.columns) for f in _clips(scenes, args.size, args.frames)]
        frames[0].save(
            args.out, save_all=True, append_images=frames[1:], duration=int(1000 / FPS), loop=0, quality=70, method=6
        )
    else:
        draw_sheet(_stills(scenes, args.size), captions, args.columns).save(args.out, optimize=True)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1000:.0f} kB)")
