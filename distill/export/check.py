"""TensorRT engines executed on this machine's GPU: parity with torch, pictures, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from distill.bundle import Bundle, Engine
from distill.engines.cuda import CudaUnavailable, find_gpu
from distill.engines.tensorrt import EngineRefused, Flavour, TensorRtEngine, runs_on
from distill.export import parity
from distill.export.graphs import Inputs, load_graphs
from distill.export.onnx import ExportError


class EngineGraph:
    """An engine called with torch tensors, as the parity check calls every graph."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self._engine = engine

    def run(self, inputs: Inputs) -> Inputs:
        results = self._engine.run({name: inputs[name].numpy() for name in self._engine.inputs})
        return {name: torch.from_numpy(value) for name, value in results.items()}


def require_gpu(architecture: str | None) -> None:
    """Raise ExportError when this machine has no GPU, or none that engines of this architecture run on.

    architecture: None for engines that are built for whichever GPU is here.
    """
    try:
        gpu = find_gpu()
    except CudaUnavailable as error:
        raise ExportError(
            f"--check runs the engines and this machine has no NVIDIA GPU ({error}); leave --check out to build only"
        ) from None
    if architecture is not None and not runs_on(architecture, gpu.capability):
        raise ExportError(
            f"--check runs the engines, which are for {architecture}; this GPU ({gpu.name}) is {gpu.architecture}: "
            "install the TensorRT that is for it, or leave --check out"
        )


def check_engines(
    bundle: Bundle, built: list[Engine], files: Mapping[str, Path], flavour: Flavour, say: Callable[[str], None]
) -> list[Engine]:
    """The engines with status "verified", parity and latency. Raises ExportError outside the tolerance."""
    specs = load_graphs(bundle.path, bundle.manifest)
    try:
        graphs: dict[str, EngineGraph] = {
            engine.graph: EngineGraph(TensorRtEngine(files[engine.graph], flavour)) for engine in built
        }
    except EngineRefused as error:
        raise ExportError(str(error)) from None
    checked = []
    for engine in built:
        spec, graph = specs[engine.graph], graphs[engine.graph]
        measured = parity.check_graph(spec, graph, engine.precision)
        latency = parity.time_graph(spec, graph)
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in measured.items())
        say(f"{engine.graph}: {numbers}; milliseconds by rows {latency}")
        update = {"status": "verified", "parity": measured, "latency_ms": latency}
        checked.append(engine.model_copy(update=update))
    precision = next(engine.precision for engine in built if engine.graph == "step")
    examples = parity.example_tokens(bundle.path, bundle.manifest)
    images = parity.check_pictures(specs, graphs, bundle.manifest, precision, examples)
    for steps, row in images.items():
        say(f"pictures in {steps} steps: at most {row['levels']:.0f} of 255 levels, {row['psnr_db']:.1f} dB")
    return checked
