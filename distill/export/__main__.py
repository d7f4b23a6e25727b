"""Command line of the export; see distill.export."""

from __future__ import annotations

import argparse
import sys

from distill.bundle import Bundle, BundleError

EXAMPLE = "example: python -m distill.export bundles/scenes-sdxl --to onnx"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Compile the student of a bundle, compare every graph and whole pictures with torch, and write "
        "the graphs into the bundle. A graph that does not reproduce torch fails the export and nothing is written.",
        epilog=EXAMPLE,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle, the one with bundle.json")
    parser.add_argument("--to", required=True, choices=("onnx",), help="runtime to compile for")
    parser.add_argument("--opset", type=int, default=22, help="ONNX operator set (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        Bundle.open(options.bundle)  # before torch is imported, so that a wrong path is told at once
    except BundleError as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    try:
        import transformers

        from distill.export.onnx import ExportError
        from distill.export.run import export_onnx, written
    except ModuleNotFoundError as error:
        print(f"export needs {error.name}; run: pip install -e '.[train]'", file=sys.stderr)
        return 1
    transformers.utils.logging.disable_progress_bar()
    try:
        bundle = export_onnx(options.bundle, options.opset)
    except (BundleError, ExportError, ValueError) as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    for path in written(bundle):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
