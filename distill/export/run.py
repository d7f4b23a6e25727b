"""Export a bundle: compile every graph, check it, and only then put files and manifest in place."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from distill.bundle import Bundle, Engine, Manifest, write_manifest
from distill.export import parity
from distill.export.graphs import GraphSpec, load_graphs
from distill.export.onnx import OPSET, compile_graph

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")


def export_onnx(path: str | os.PathLike[str], opset: int = OPSET, say: Callable[[str], None] = print) -> Bundle:
    """Compile a bundle's graphs to ONNX, compare them with torch and write them and the manifest into the bundle.

    Raises BundleError for a bundle that cannot be trusted and ExportError for a graph that fails; in both cases the
    bundle is as it was.
    """
    bundle = Bundle.open(path)
    specs = load_graphs(bundle.path, bundle.manifest)
    finals = {name: bundle.path / "onnx" / f"{name}.onnx" for name in specs}
    drafts = {name: final.with_name(final.name + ".tmp") for name, final in finals.items()}
    try:
        measured = {}
        compiled = {}
        for index, (name, spec) in enumerate(specs.items(), start=1):
            started = time.perf_counter()
            compile_graph(spec, drafts[name], opset)
            compiled[name] = parity.OnnxGraph(drafts[name])
            measured[name] = parity.check_graph(spec, compiled[name])
            size_mb, duration_s = drafts[name].stat().st_size / 1e6, time.perf_counter() - started
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in measured[name].items())
            say(f"[{index}/{len(specs)}] {name}: {size_mb:.1f} MB in {duration_s:.0f} s; {numbers}")
        images = parity.check_pictures(specs, compiled, bundle.manifest)
        for steps, row in images.items():
            say(f"pictures in {steps} steps: at most {row['levels']:.0f} of 255 levels, {row['changed']:.2%} of values")
        del compiled
        manifest = _manifest(bundle.manifest, specs, measured, images, opset)
        for name, final in finals.items():
            os.replace(drafts[name], final)
        return write_manifest(bundle.path, manifest)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (bundle.path / "onnx").rmdir()


def _manifest(
    manifest: Manifest,
    specs: dict[str, GraphSpec],
    measured: dict[str, dict[str, float]],
    images: dict[int, dict[str, float]],
    opset: int,
) -> Manifest:
    engines = tuple(
        Engine(
            graph=spec.name,
            file=f"onnx/{name}.onnx",
            opset=opset,
            inputs={name: spec.dims[name] for name in spec.inputs},
            outputs={name: spec.dims[name] for name in spec.outputs},
            parity=measured[name],
        )
        for name, spec in specs.items()
    )
    kept = tuple(engine for engine in manifest.engines if engine.runtime != "onnx")
    record = {
        "pictures": {str(steps): row for steps, row in images.items()},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
    }
    provenance = manifest.provenance | {"export_onnx": record}
    return manifest.model_copy(update={"engines": kept + engines, "provenance": provenance})


def written(bundle: Bundle) -> list[Path]:
    """The files that an export wrote, the manifest last."""
    return [bundle.path / engine.file for engine in bundle.manifest.engines] + [bundle.path / "bundle.json"]
