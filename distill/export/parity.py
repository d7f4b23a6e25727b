"""Does a compiled student reproduce torch? Each graph on its own, then whole pictures; gates decide.

Graphs meet random inputs at the timesteps and rows of the bundle's samplers, the noisiest among them, at batch 1 and
at a larger batch. Pictures run the whole chain, text to uint8, for every number of steps of the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from distill.bundle import Manifest
from distill.export.graphs import GraphSpec, Inputs
from distill.export.onnx import ExportError
from distill.sampling import noise

MAX_RELATIVE = 1e-4
"""Gate on float outputs: greatest absolute difference over the range of the reference."""

MAX_LEVELS = 1
"""Gate on pictures: greatest difference in levels of 255."""

MAX_PSNR = 200.0
BATCHES = (1, 4)


class OnnxGraph:
    """One ONNX file on onnxruntime's CPU provider, called with torch tensors."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.inputs = [value.name for value in self.session.get_inputs()]

    def run(self, inputs: Inputs) -> Inputs:
        results = self.session.run(self.outputs, {name: inputs[name].numpy() for name in self.inputs})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(self.outputs, results, strict=True)}


def compare(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    """Differences of two batches: max_abs, relative and psnr_db for floats; levels and changed for uint8.

    relative is over the reference's range, row by row, and the worst row counts: a row at an early step has a range a
    hundred times that of a late one. changed is the share of values that differ. NaN counts as infinitely far.
    Raises ExportError when shapes or dtypes disagree.
    """
    if reference.shape != found.shape or reference.dtype != found.dtype:
        raise ExportError(
            f"the graph gave {found.dtype} {tuple(found.shape)} where torch gives "
            f"{reference.dtype} {tuple(reference.shape)}"
        )
    a, b = reference.double().flatten(1), found.double().flatten(1)
    difference = torch.where(torch.isfinite(a - b), (a - b).abs(), math.inf)
    if reference.dtype == torch.uint8:
        return {"levels": float(difference.max()), "changed": float((a != b).double().mean())}
    span = (a.amax(1) - a.amin(1)).clamp_min(torch.finfo(torch.float32).tiny)
    noise_to_signal = float(((difference**2).mean(1) / span**2).max())
    return {
        "max_abs": float(difference.max()),
        "relative": float((difference.amax(1) / span).max()),
        "psnr_db": MAX_PSNR if noise_to_signal == 0 else min(MAX_PSNR, -10 * math.log10(noise_to_signal)),
    }


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The worst of each number over several comparisons; psnr_db is better when larger, the others when smaller."""
    return {key: (min if key == "psnr_db" else max)(row[key] for row in rows) for key in rows[0]}


def gate(where: str, measured: Mapping[str, float]) -> None:
    """Raise ExportError that names the number when a comparison is outside its tolerance."""
    for key, limit in (("relative", MAX_RELATIVE), ("levels", MAX_LEVELS)):
        value = measured.get(key, 0.0)
        if not value <= limit:
            raise ExportError(
                f"{where} differs from torch: {key} {value:.3g}, allowed {limit:g}; nothing was written, "
                "try another --opset"
            )


def check_graph(spec: GraphSpec, graph: OnnxGraph, seed: int = 0) -> dict[str, float]:
    """Compare a graph with torch at every batch of BATCHES. Raises ExportError outside the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in BATCHES:
        inputs = spec.sample(batch, generator)
        reference, found = spec.run(inputs), graph.run(inputs)
        for name in spec.outputs:
            row = compare(reference[name], found[name])
            gate(f"{spec.name}.{name} at batch {batch}", row)
            rows.append(row)
    return worst(rows)


Graphs = Mapping[str, "GraphSpec | OnnxGraph"]


def pictures(graphs: Graphs, manifest: Manifest, first: Inputs, steps: int, seeds: list[int]) -> NDArray[np.uint8]:
    """Whole pictures (B, H, W, 3) uint8, by torch or by the compiled graphs.

    first: the inputs of the first graph, input_ids or labels, one row per seed.
    """
    table = manifest.samplers[steps].table()
    width, height = manifest.sizes[0]
    shape = (manifest.latent_channels, height // manifest.latent_stride, width // manifest.latent_stride)
    drawn = torch.from_numpy(np.stack([noise(seed, 0, shape, draws=steps + 1) for seed in seeds]))
    conditioning = graphs["text_encoder"].run(first) if "text_encoder" in graphs else first
    latents = drawn[:, 0]
    for step in range(steps):
        inputs = {
            "latents": latents,
            "timestep": torch.from_numpy(np.repeat(table.timesteps[step], len(seeds))),
            "coefficients": torch.from_numpy(np.repeat(table.rows[step : step + 1], len(seeds), axis=0)),
            "noise": drawn[:, step + 1],
        }
        latents = graphs["step"].run(inputs | conditioning)["next"]
    image: NDArray[np.uint8] = graphs["decoder"].run({"latents": latents})["image"].numpy()
    return image


def check_pictures(
    specs: Mapping[str, GraphSpec], compiled: Mapping[str, OnnxGraph], manifest: Manifest, batch: int = 2
) -> dict[int, dict[str, float]]:
    """Compare whole pictures with torch for every number of steps. Raises ExportError outside the tolerance."""
    generator = torch.Generator().manual_seed(0)
    source = specs.get("text_encoder") or specs["step"]
    sampled = source.sample(batch, generator)
    first: Inputs = {name: value for name, value in sampled.items() if name in ("input_ids", "labels")}
    results = {}
    for steps in sorted(manifest.samplers):
        reference = pictures(specs, manifest, first, steps, list(range(batch)))
        found = pictures(compiled, manifest, first, steps, list(range(batch)))
        results[steps] = compare(torch.from_numpy(reference), torch.from_numpy(found))
        gate(f"the picture after {steps} steps", results[steps])
    return results
