"""Convert a published checkpoint into a diffusers folder.

python -m distill.convert SiT-XL-2-256.pt models/sit-xl-2-256 --vae stabilityai/sd-vae-ft-ema
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill.config import RecipeError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.convert",
        description="Turn a published SiT checkpoint into a diffusers folder (DiTTransformer2DModel, flow matching).",
        epilog="example: python -m distill.convert SiT-XL-2-256.pt models/sit-xl-2-256 --vae stabilityai/sd-vae-ft-ema",
    )
    parser.add_argument("checkpoint", type=Path, help="a .pt or .safetensors file with SiT's own key names")
    parser.add_argument("output", type=Path, help="the folder to write, such as models/sit-xl-2-256")
    parser.add_argument("--vae", required=True, help="folder or hub id of its AutoencoderKL")
    parser.add_argument("--heads", type=int, help="attention heads, where the width is none of S, B, L and XL")
    options = parser.parse_args(arguments)
    from distill.convert.sit import convert

    try:
        parameters = convert(options.checkpoint, options.output, options.vae, heads=options.heads)
    except (RecipeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output} ({parameters:,} parameters)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
