"""Does a compiled student reproduce torch? Each graph on its own, then whole pictures; gates decide.

Graphs meet random inputs at the timesteps and rows of the bundle's samplers, the noisiest among them, at batch 1 and
at a larger batch, in every size that the bundle declares. Pictures run the whole chain, text to uint8, for every number
of steps of the bundle, from random prompts and from its own examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from distill.bundle import Manifest
from distill.export.graphs import GraphSpec, Inputs
from distill.export.onnx import ExportError
from distill.sampling import noise


@dataclass(frozen=True)
class Tolerance:
    """What a comparison may show. Gates of pictures are of uint8, all others of float outputs."""

    relative: float = math.inf
    """Greatest absolute difference over the range of the reference, row by row."""
    psnr_db: float = 0.0
    levels: float = math.inf
    """Greatest difference of pictures, of 255."""
    picture_db: float = 0.0


TOLERANCES = {
    "float32": Tolerance(relative=1e-4, psnr_db=100.0, levels=1, picture_db=60.0),
    "float16": Tolerance(psnr_db=50.0, levels=24, picture_db=40.0),
    "bfloat16": Tolerance(psnr_db=45.0, levels=48, picture_db=35.0),
    "int8": Tolerance(psnr_db=25.0, picture_db=20.0),
}
"""By precision. Reduced ones open the door; whether they may serve is for the scores to say."""

MAX_PSNR = 200.0
BATCHES = (1, 4)


class Compiled(Protocol):
    """A graph that something other than torch computes, called with torch tensors."""

    def run(self, inputs: Inputs) -> Inputs: ...


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
    """Differences of two batches: max_abs, relative and psnr_db for floats; levels, changed and psnr_db for uint8.

    relative is over the reference's range, row by row, and the worst row counts: a row at an early step has a range a
    hundred times that of a late one. psnr_db is over the same range, or over 255 levels. changed is the share of values
    that differ. NaN counts as infinitely far. Raises ExportError when shapes or dtypes disagree.
    """
    if reference.shape != found.shape or reference.dtype != found.dtype:
        raise ExportError(
            f"the graph gave {found.dtype} {tuple(found.shape)} where torch gives "
            f"{reference.dtype} {tuple(reference.shape)}"
        )
    a, b = reference.double().flatten(1), found.double().flatten(1)
    difference = torch.where(torch.isfinite(a - b), (a - b).abs(), math.inf)
    picture = reference.dtype == torch.uint8
    span = torch.full((len(a),), 255.0, dtype=torch.float64) if picture else a.amax(1) - a.amin(1)
    span = span.clamp_min(torch.finfo(torch.float32).tiny)
    noise_to_signal = float(((difference**2).mean(1) / span**2).max())
    psnr_db = MAX_PSNR if noise_to_signal == 0 else min(MAX_PSNR, -10 * math.log10(noise_to_signal))
    if picture:
        return {"levels": float(difference.max()), "changed": float((a != b).double().mean()), "psnr_db": psnr_db}
    return {
        "max_abs": float(difference.max()),
        "relative": float((difference.amax(1) / span).max()),
        "psnr_db": psnr_db,
    }


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The worst of each number over several comparisons; psnr_db is better when larger, the others when smaller."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: (min if key == "psnr_db" else max)(row[key] for row in rows if key in row) for key in keys}


def gate(where: str, measured: Mapping[str, float], precision: str = "float32") -> None:
    """Raise ExportError that names the number when a comparison is outside its tolerance."""
    limits = TOLERANCES[precision]
    least_db = limits.picture_db if "levels" in measured else limits.psnr_db
    bounds = {"relative": limits.relative, "levels": limits.levels}
    for key, limit in bounds.items():
        if not measured.get(key, 0.0) <= limit:
            raise _beyond(where, f"{key} {measured[key]:.3g}, allowed {limit:g}", precision)
    if not measured["psnr_db"] >= least_db:
        raise _beyond(where, f"psnr_db {measured['psnr_db']:.1f}, asked for {least_db:g}", precision)


def _beyond(where: str, numbers: str, precision: str) -> ExportError:
    way_out = "another --opset" if precision == "float32" else "--precision float32"
    return ExportError(f"{where} differs from torch: {numbers}; nothing was written, try {way_out}")


def check_graph(spec: GraphSpec, graph: Compiled, precision: str = "float32", seed: int = 0) -> dict[str, float]:
    """Compare a graph with torch at its corners. Raises ExportError outside the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch, size in corners(spec):
        inputs = spec.sample(batch, generator, size)
        reference, found = spec.run(inputs), graph.run(inputs)
        where = f"at batch {batch}" + (f" and {size[1]}x{size[0]} latents" if size and len(spec.sizes) > 1 else "")
        for name in spec.outputs:
            row = compare(reference[name], found[name])
            gate(f"{spec.name}.{name} {where}", row, precision)
            rows.append(row)
    return worst(rows)


def corners(spec: GraphSpec) -> list[tuple[int, tuple[int, int] | None]]:
    """(rows, (height, width) in latents) of the calls that are compared: every size alone, the first one in a batch.

    A size that is greatest or least along an axis is among them, as every request is of one of these sizes.
    """
    sizes: tuple[tuple[int, int] | None, ...] = spec.sizes or (None,)
    return [*((batch, sizes[0]) for batch in BATCHES), *((BATCHES[0], size) for size in sizes[1:])]


def time_graph(spec: GraphSpec, graph: Compiled, repeats: int = 5) -> dict[int, float]:
    """Milliseconds of one call by rows, the median after one call to warm up; a note, not a benchmark."""
    found = {}
    for batch in BATCHES:
        inputs = spec.sample(batch, torch.Generator().manual_seed(0), spec.sizes[0] if spec.sizes else None)
        graph.run(inputs)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            graph.run(inputs)
            times.append((time.perf_counter() - started) * 1e3)
        found[batch] = round(sorted(times)[repeats // 2], 3)
    return found


Graphs = Mapping[str, "GraphSpec | Compiled"]


def pictures(
    graphs: Graphs, manifest: Manifest, first: Inputs, steps: int, seeds: list[int], size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Whole pictures (B, H, W, 3) uint8, or clips (B, F, H, W, 3), by torch or by the compiled graphs.

    first: the inputs of the first graph, input_ids or labels, one row per seed; size: (width, height) in pixels, the
    manifest's first if None.
    """
    table = manifest.samplers[steps].table()
    shape = manifest.latent_shape(size)
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
    specs: Mapping[str, GraphSpec],
    compiled: Mapping[str, Compiled],
    manifest: Manifest,
    precision: str = "float32",
    examples: Inputs | None = None,
) -> dict[int, dict[str, float]]:
    """Compare whole pictures with torch: by number of steps the worst of batch 1 and 2, random and real prompts, sizes.

    examples: what the text encoder reads of the bundle's own prompts. Raises ExportError outside the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    source = specs.get("text_encoder") or specs["step"]
    drawn: Inputs = {
        k: v for k, v in source.sample(2, generator).items() if k in ("input_ids", "attention_mask", "labels")
    }
    calls = [(drawn, size) for size in manifest.sizes]
    if examples is not None:
        alone = {name: value[:1] for name, value in examples.items()}
        calls += [(first, manifest.sizes[0]) for first in (alone, examples)]
    results = {}
    for steps in sorted(manifest.samplers):
        rows = []
        for first, size in calls:
            seeds = list(range(len(next(iter(first.values())))))
            reference = pictures(specs, manifest, first, steps, seeds, size)
            found = pictures(compiled, manifest, first, steps, seeds, size)
            rows.append(compare(torch.from_numpy(reference), torch.from_numpy(found)))
            gate(f"the picture after {steps} steps", rows[-1], precision)
        results[steps] = worst(rows)
    return results


def example_tokens(bundle_dir: Path, manifest: Manifest) -> Inputs | None:
    """input_ids and attention_mask (B, L) int64 of the manifest's examples by the bundle's own tokenizer.

    None without prompts or examples.
    """
    if manifest.max_tokens is None or not manifest.examples:
        return None
    from transformers import AutoTokenizer, CLIPTokenizer

    kind = AutoTokenizer if manifest.frames else CLIPTokenizer
    tokenizer = kind.from_pretrained(bundle_dir / "tokenizer", local_files_only=True)
    asked = list(manifest.examples[:2])
    encoded = tokenizer(
        asked, padding="max_length", truncation=True, max_length=manifest.max_tokens, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
