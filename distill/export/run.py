"""Export a bundle: compile every graph, check it, and only then put files and manifest in place."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from distill.bundle import Bundle, Engine, Manifest, sha256
from distill.export import parity
from distill.export.drafts import check_room, drafts
from distill.export.estimate import estimate
from distill.export.graphs import GraphSpec, load_graphs
from distill.export.layers import first_difference
from distill.export.onnx import OPSET, ExportError, compile_graph
from distill.export.weights import Weights

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")


def export_onnx(path: str | os.PathLike[str], opset: int = OPSET, say: Callable[[str], None] = print) -> Bundle:
    """Compile a bundle's graphs to ONNX, compare them with torch and write them and the manifest into the bundle.

    Raises BundleError for a bundle that cannot be trusted and ExportError for a graph that fails; in both cases the
    bundle is as it was.
    """
    bundle = Bundle.open(path)
    specs = load_graphs(bundle.path, bundle.manifest)
    check_room(bundle.path, sum(estimate(name, spec.module, shared=True).file_bytes for name, spec in specs.items()))
    weights = Weights.of(bundle)
    finals = {name: bundle.path / f"{name}.onnx" for name in specs}
    with drafts(bundle.path) as made:
        compiled: dict[str, parity.OnnxGraph] = {}
        measured, latency = {}, {}
        for index, (name, spec) in enumerate(specs.items(), start=1):
            started, draft = time.perf_counter(), made.path(finals[name])
            compile_graph(spec, draft, opset, weights)
            compiled[name] = parity.OnnxGraph(draft)
            measured[name] = verify(spec, compiled[name], draft, opset)
            latency[name] = parity.time_graph(spec, compiled[name])
            size_mb, duration_s = draft.stat().st_size / 1e6, time.perf_counter() - started
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in measured[name].items())
            say(f"[{index}/{len(specs)}] {name}: {size_mb:.1f} MB in {duration_s:.0f} s; {numbers}")
        examples = parity.example_tokens(bundle.path, bundle.manifest)
        images = parity.check_pictures(specs, compiled, bundle.manifest, examples=examples)
        for steps, row in images.items():
            say(f"pictures in {steps} steps: at most {row['levels']:.0f} of 255 levels, {row['changed']:.2%} of values")
        del compiled
        manifest = _manifest(bundle.manifest, specs, measured, latency, images, opset)
        stale = outdated(manifest, {final.name: sha256(made.path(final)) for final in finals.values()})
        if stale:
            say(f"{len(stale)} engines of other precisions and runtimes were of older graphs and are gone")
        fresh = tuple(engine for engine in manifest.engines if engine not in stale)
        left = {engine.file for engine in fresh} - {final.name for final in finals.values()}
        gone = {engine.file for engine in bundle.manifest.engines} - left
        return made.commit(
            manifest.model_copy(update={"engines": fresh}),
            obsolete=[bundle.path / f"{name}{end}" for name in sorted(gone) for end in ("", ".data")],
        )


def outdated(manifest: Manifest, digests: Mapping[str, str]) -> list[Engine]:
    """Engines that were made from graphs that are about to change. digests: sha256 of the new graphs by file."""
    if digests.items() <= manifest.files.items():
        return []
    return [engine for engine in manifest.engines if engine.file not in digests]


def verify(spec: GraphSpec, graph: parity.Compiled, file: Path, opset: int) -> dict[str, float]:
    """Compare a graph with torch. Raises ExportError outside the tolerance, with the first layer where they part."""
    try:
        return parity.check_graph(spec, graph)
    except ExportError as error:
        found = first_difference(spec, file, opset)
        raise ExportError(f"{error}; {found}") from None


def _manifest(
    manifest: Manifest,
    specs: dict[str, GraphSpec],
    measured: dict[str, dict[str, float]],
    latency: dict[str, dict[int, float]],
    images: dict[int, dict[str, float]],
    opset: int,
) -> Manifest:
    engines = tuple(
        Engine(
            graph=spec.name,
            file=f"{name}.onnx",
            opset=opset,
            inputs={name: spec.dims[name] for name in spec.inputs},
            outputs={name: spec.dims[name] for name in spec.outputs},
            parity=measured[name],
            latency_ms=latency[name],
        )
        for name, spec in specs.items()
    )
    kept = tuple(engine for engine in manifest.engines if (engine.runtime, engine.precision) != ("onnx", "float32"))
    record = {
        "pictures": {str(steps): row for steps, row in images.items()},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
    }
    provenance = manifest.provenance | {"export_onnx": record}
    return manifest.model_copy(update={"engines": kept + engines, "provenance": provenance})


def written(bundle: Bundle, to: str, precision: str = "float32") -> list[Path]:
    """The files that an export wrote or left as they were, the manifest last. to: "onnx" or "tensorrt"."""
    engines = [e for e in bundle.manifest.engines if e.runtime.startswith(to) and e.precision == precision]
    return [bundle.path / engine.file for engine in engines] + [bundle.path / "bundle.json"]
