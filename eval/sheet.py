"""A contact sheet: the same prompts and seeds from several sources, side by side.

    python -m eval.sheet --suite scenes-trained --out docs/sheet.png \\
        --source "teacher, 50 steps=runs/teacher-bundle@50" --source "AMD, 4 steps=bundles/scenes-sdxl@4"

Clips, of a suite with frames, make an animated sheet: --out docs/sheet-wan.webp.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eval.errors import EvalError
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import Source, generate, open_source

_GAP = 6
_TEXT_WIDTH = 230
_HEAD = 26
_FONT_SIZE = 13


def contact_sheet(columns: dict[str, NDArray[np.uint8]], prompts: Sequence[Prompt], *, scale: int = 2) -> Image.Image:
    """Rows are prompts with their text at the left, columns are sources. columns: label -> (B, 3, H, W) uint8."""
    shapes = {images.shape for images in columns.values()}
    if len(shapes) != 1 or len(prompts) != next(iter(shapes))[0]:
        raise EvalError(
            f"pictures of shapes {sorted(shapes)} for {len(prompts)} prompts; give equal ones, one per prompt"
        )
    _, _, height, width = shapes.pop()
    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    sheet = Image.new("RGB", (_TEXT_WIDTH + len(columns) * cell_w, _HEAD + len(prompts) * cell_h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for column, (label, images) in enumerate(columns.items()):
        left = _TEXT_WIDTH + column * cell_w
        draw.text((left + 2, 6), label, "black", font=font)
        for row, image in enumerate(images):
            picture = Image.fromarray(image.transpose(1, 2, 0))
            picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, _HEAD + row * cell_h))
    for row, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt.text, 34)) + f"\nseed {prompt.seed}"
        draw.multiline_text((8, _HEAD + row * cell_h + 4), text, "black", font=font)
    return sheet


def save_sheet(
    columns: dict[str, NDArray[np.uint8]], prompts: Sequence[Prompt], out: Path, *, scale: int = 2, fps: float = 8.0
) -> None:
    """Write a sheet of pictures, or of clips (B, F, 3, H, W) an animated one, .webp or .gif."""
    lengths = {images.shape[1] for images in columns.values() if images.ndim == 5}
    moving = bool(lengths)
    if moving != (out.suffix in (".webp", ".gif")):
        raise EvalError(f"--out is {out}; name a .webp or .gif file for clips, and a .png file for pictures")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not moving:
        contact_sheet(columns, prompts, scale=scale).save(out)
        return
    if len(lengths) > 1:
        raise EvalError(f"clips of {sorted(lengths)} frames cannot stand side by side; give sources of one length")
    at = [{label: clips[:, i] for label, clips in columns.items()} for i in range(lengths.pop())]
    first, *rest = [contact_sheet(frame, prompts, scale=scale) for frame in at]
    first.save(out, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=80, method=4)


def pictures(source: Source, prompts: Sequence[Prompt]) -> NDArray[np.uint8]:
    """(B, 3, H, W) uint8 of all prompts, of clips (B, F, 3, H, W)."""
    return np.concatenate([made.images for made in generate(source, prompts, batch=8)])


def parse_source(text: str) -> tuple[str, str, int | None]:
    """LABEL=WHERE or LABEL=WHERE@STEPS."""
    label, found, where = text.rpartition("=")
    path, at, steps = where.rpartition("@")
    if not found or not label or (at and not steps.isdigit()):
        raise EvalError(f"--source is {text!r}; write LABEL=BUNDLE@STEPS, such as 'AMD, 4 steps=bundles/scenes-sdxl@4'")
    return (label, path, int(steps)) if at else (label, where, None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.sheet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", action="append", required=True, metavar="LABEL=WHERE[@STEPS]", help="give several")
    parser.add_argument("--suite", default="scenes-trained", help="whose prompts and seeds; default: %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="rows; default: %(default)s")
    parser.add_argument("--scale", type=int, default=2, help="enlargement; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file; of clips a WebP or GIF file")
    args = parser.parse_args(arguments)
    try:
        suite = load_suite(args.suite)
        prompts = build_prompts(suite, args.samples)
        columns = {}
        for text in args.source:
            label, where, steps = parse_source(text)
            columns[label] = pictures(open_source(where, steps=steps, batch=8, frames=suite.frames), prompts)
        save_sheet(columns, prompts, args.out, scale=args.scale)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
