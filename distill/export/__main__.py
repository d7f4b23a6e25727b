"""Command line of the export; see distill.export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill.bundle import Bundle, BundleError

PUBLISHED = ("diffusers", "lora", "comfyui")
NEW = ("loop", *PUBLISHED)
"""What is written outside of the bundle."""

EXAMPLE = (
    "example: python -m distill.export bundles/scenes-sdxl --to onnx\n"
    "         python -m distill.export bundles/scenes-sdxl --to tensorrt --check\n"
    "         python -m distill.export bundles/scenes-sdxl --to diffusers --out /tmp/scenes-sdxl"
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="onnx: compile the student of a bundle, compare every graph and whole pictures with torch, and\n"
        "write the graphs into the bundle; a graph that does not reproduce torch fails the export and nothing is\n"
        "written. tensorrt: build engines from the bundle's ONNX graphs, with --check also run and compare them; an\n"
        "engine runs on the kind of GPU and the version that it was built for. loop: all steps of the student as one\n"
        "ONNX graph, for offline use. diffusers, lora, comfyui: write a new folder for others, with a model card.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the examples on lines of their own
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle, the one with bundle.json")
    parser.add_argument("--to", required=True, choices=("onnx", "tensorrt", "loop", *PUBLISHED), help="what to write")
    parser.add_argument("--opset", type=int, default=22, help="onnx: operator set (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="onnx: of the denoiser and decoder, from the float32 graphs; tensorrt: of the ONNX graphs to build",
    )
    parser.add_argument("--dry-run", action="store_true", help="onnx: sizes and time; nothing is written")
    parser.add_argument("--check", action="store_true", help="tensorrt: run the engines on this machine's GPU")
    parser.add_argument(
        "--rows", type=int, default=8, help="tensorrt: greatest batch of an engine (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="loop: number of steps (default: the bundle's own)")
    parser.add_argument("--out", type=Path, help="diffusers, lora, comfyui: the new folder; loop: the new file")
    parser.add_argument("--rank", type=int, help="lora: its rank (default: its training's, or 64); comfyui: a LoRA")
    parser.add_argument("--teacher", help="lora: what the student was distilled from (default: as the bundle says)")
    parser.add_argument("--run", type=Path, help="folder of the training run, for its cost (default: runs/NAME)")
    options = parser.parse_args(arguments)
    if (options.to in NEW) != (options.out is not None):
        parser.error(f"--to {options.to} {'needs' if options.to in NEW else 'takes no'} --out")
    if options.steps is not None and options.to != "loop":
        parser.error(f"--steps is for --to loop; --to {options.to} is for every number of steps of the bundle")
    if options.precision != "float32" and options.to not in ("onnx", "tensorrt"):
        parser.error(f"--precision is for --to onnx and tensorrt; --to {options.to} has one of its own")
    for name in ("rank", "rows"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; give at least 1")
    if options.dry_run and (options.to, options.precision) != ("onnx", "float32"):
        parser.error("--dry-run is for --to onnx in float32; the others work from its graphs")
    if options.check and options.to != "tensorrt":
        parser.error(f"--check is for --to tensorrt; --to {options.to} always compares what it writes with torch")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        Bundle.open(options.bundle)  # before torch is imported, so that a wrong path is told at once
    except BundleError as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if options.dry_run:
            return _dry_run(options.bundle)
        paths = _publish(options) if options.to in PUBLISHED else _compile(options)
    except ModuleNotFoundError as error:
        print(f"export needs {error.name}; run: pip install -e '.[train]'", file=sys.stderr)
        return 1
    except (BundleError, ValueError) as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path}")
    return 0


def _dry_run(path: str) -> int:
    from distill.export.estimate import estimate, report
    from distill.export.graphs import load_graphs

    bundle = Bundle.open(path)
    specs = load_graphs(bundle.path, bundle.manifest)
    print("\n".join(report(estimate(name, spec.module, shared=True) for name, spec in specs.items())))
    return 0


def _compile(options: argparse.Namespace) -> list[Path]:
    from distill.export.drafts import DiskFull
    from distill.export.loop import export_loop
    from distill.export.onnx import ExportError
    from distill.export.reduced import export_reduced
    from distill.export.run import export_onnx, written
    from distill.export.tensorrt import export_tensorrt

    try:
        if options.to == "loop":
            return export_loop(options.bundle, options.steps, options.out)
        if options.to == "tensorrt":
            rows = (1, min(4, options.rows), options.rows)
            bundle = export_tensorrt(options.bundle, precision=options.precision, rows=rows, check=options.check)
        elif options.precision == "float32":
            bundle = export_onnx(options.bundle, options.opset)
        else:
            bundle = export_reduced(options.bundle, options.precision)
    except (ExportError, DiskFull) as error:
        raise BundleError(str(error)) from None
    except OSError as error:
        raise BundleError(f"{error.strerror} at {error.filename or options.bundle}; nothing was written") from None
    return written(bundle, options.to, options.precision)


def _publish(options: argparse.Namespace) -> list[Path]:
    from distill.export.publish import publish

    return publish(options.bundle, options.to, options.out, rank=options.rank, teacher=options.teacher, run=options.run)


if __name__ == "__main__":
    sys.exit(main())
