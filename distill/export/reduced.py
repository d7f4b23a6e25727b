"""The float32 ONNX graphs of a bundle in a smaller precision, beside them: float16, bfloat16, or int8 for the denoiser.

float16 and bfloat16 are for GPUs and TensorRT, which take the precision from the file. No processor computes in them as
a GPU does: ONNX Runtime has no bfloat16 at all and makes float32 of float16. So what is compared with torch is the
model of their arithmetic of distill.export.precision, and the graph is "built", not "verified".

int8 is for ONNX Runtime and OpenVINO on a processor. It is executed, but a candidate only: whether its pictures are as
good is for the scores to say, see docs/export.md.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from distill.bundle import Bundle, Engine
from distill.export import parity
from distill.export.drafts import check_room, drafts
from distill.export.graphs import GraphSpec, load_graphs
from distill.export.onnx import MAX_FILE_BYTES, ExportError, weight_bytes
from distill.export.precision import Group, Reduced, choose_kept, lower, rounded
from distill.export.quantize import calibration, quantize
from distill.export.weights import Weights, share

Smaller = Literal["float16", "bfloat16", "int8"]
GRAPHS = {"float16": ("step", "decoder"), "bfloat16": ("step", "decoder"), "int8": ("step",)}
MEASURED_SEEDS = (0, 1)
PACKAGES = ("onnx", "onnxruntime", "torch")


def export_reduced(path: str | os.PathLike[str], precision: Smaller, say: Callable[[str], None] = print) -> Bundle:
    """Write a bundle's graphs in a smaller precision beside its float32 ones, and how far they are from torch.

    Raises BundleError for a bundle without float32 graphs and ExportError beyond the tolerance of the precision; in
    both cases the bundle is as it was.
    """
    bundle = Bundle.open(path)
    specs = load_graphs(bundle.path, bundle.manifest)
    for name, spec in specs.items():
        if weight_bytes(spec) > MAX_FILE_BYTES:
            raise ExportError(f"graph {name!r} is beyond 2 GB, where only float32 is written; leave --precision out")
    sources = {name: bundle.engine(name) for name in specs}
    files = {name: bundle.file(source.file) for name, source in sources.items()}
    quantised = weight_bytes(specs["step"]) if precision == "int8" else 0  # int8, and float32 of what is spared
    check_room(bundle.path, sum(file.stat().st_size for file in files.values()) + quantised)
    chosen = [name for name in GRAPHS[precision] if any(True for _ in specs[name].module.parameters())]
    finals = {name: bundle.path / f"{name}.{precision}.onnx" for name in chosen}
    graphs: dict[str, parity.Compiled] = {name: parity.OnnxGraph(file) for name, file in files.items()}
    weights = Weights.of(bundle)
    with drafts(bundle.path) as made:
        engines: list[Engine] = []
        notes: dict[str, dict[str, float]] = {}
        for index, name in enumerate(chosen, start=1):
            model, draft = onnx.load(files[name]), made.path(finals[name])
            kept: tuple[Group, ...] = ()
            if precision == "int8":
                with tempfile.TemporaryDirectory() as folder:
                    written = quantize(model, calibration(bundle.manifest, specs, graphs), Path(folder))
            else:
                kept, notes[name] = choose_kept(functools.partial(_measure, specs[name], model, precision))
                written = lower(model, precision, kept)
            share(written, weights)
            draft.write_bytes(written.SerializeToString(deterministic=True))
            graphs[name] = parity.OnnxGraph(draft) if precision == "int8" else _emulated(model, precision, kept)
            if precision == "float16":
                parity.check_graph(specs[name], parity.OnnxGraph(draft), precision)  # its wiring
            measured = parity.check_graph(specs[name], graphs[name], precision)
            update = {"kept": kept, "file": finals[name].relative_to(bundle.path).as_posix(), "precision": precision}
            update |= _standing(precision, measured, specs[name], graphs[name])
            engines.append(sources[name].model_copy(update=update))
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in measured.items())
            in_float32 = f"; {', '.join(kept)} in float32" if kept else ""
            size_mb = draft.stat().st_size / 1e6
            say(f"[{index}/{len(chosen)}] {name}: {size_mb:.1f} MB; {numbers}{in_float32}")
        examples = parity.example_tokens(bundle.path, bundle.manifest)
        images = parity.check_pictures(specs, graphs, bundle.manifest, precision, examples)
        for steps, row in images.items():
            say(f"pictures in {steps} steps: at most {row['levels']:.0f} of 255 levels, {row['psnr_db']:.1f} dB")
        record = {
            "pictures": {str(steps): row for steps, row in images.items()},
            "psnr_db": notes,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        others = [e for e in bundle.manifest.engines if (e.runtime, e.precision) != ("onnx", precision)]
        provenance = bundle.manifest.provenance | {f"export_onnx_{precision}": record}
        return made.commit(
            bundle.manifest.model_copy(update={"engines": (*others, *engines), "provenance": provenance})
        )


def _measure(spec: GraphSpec, model: onnx.ModelProto, precision: Reduced, keep: Collection[Group]) -> float:
    """psnr_db against torch in the model of the arithmetic, the mean over rows, which stand at different times."""
    graph = _emulated(model, precision, keep)
    found = []
    for seed in MEASURED_SEEDS:
        inputs = spec.sample(4, torch.Generator().manual_seed(seed), spec.sizes[0])
        expected, given = (side.run(inputs)[spec.outputs[-1]] for side in (spec, graph))
        found += [parity.compare(*rows)["psnr_db"] for rows in zip(expected.split(1), given.split(1), strict=True)]
    return sum(found) / len(found)


def _emulated(model: onnx.ModelProto, precision: Reduced, kept: Collection[Group]) -> parity.Compiled:
    """The model of a graph's arithmetic on ONNX Runtime's CPU provider."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rounded.onnx"
        onnx.save(rounded(model, precision, kept), file)
        return parity.OnnxGraph(file)


def _standing(
    precision: Smaller, measured: Mapping[str, float], spec: GraphSpec, graph: parity.Compiled
) -> dict[str, Any]:
    """What the manifest says of a graph's checks."""
    if precision != "int8":
        return {"status": "built", "parity": {}, "latency_ms": {}}
    return {"status": "candidate", "parity": dict(measured), "latency_ms": parity.time_graph(spec, graph)}
