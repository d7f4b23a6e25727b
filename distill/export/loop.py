"""The whole few-step student as one ONNX graph, for offline use: prompts and noise in, pictures out, no loop outside.

    python -m distill.export bundles/scenes-sdxl --to loop --steps 4 --out scenes.onnx

    input_ids (B, L) int64, or labels (B,) int64      noise (B, steps + 1, C, h, w) float32, as distill.sampling.noise
    draws it, row k of picture i for step k            image (B, H, W, 3) uint8

The step is written out once per step, with its timestep and coefficients as constants and one copy of the weights, so
that every runtime takes it: OpenVINO has no Scan. What the three graphs compute one after another is what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from distill.bundle import Bundle, BundleError
from distill.export import parity
from distill.export.drafts import check_room
from distill.export.graphs import Inputs, load_graphs
from distill.sampling import Table, noise

Rename = Callable[[str], str]


def export_loop(
    path: str | Path, steps: int | None, out: Path, batch: int = 2, say: Callable[[str], None] = print
) -> list[Path]:
    """Write the loop of a bundle's ONNX graphs to ``out``. Raises ExportError when its pictures are other ones."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    steps = steps or manifest.default_steps
    if steps not in manifest.samplers:
        raise BundleError(f"steps is {steps}; {manifest.name} samples in {sorted(manifest.samplers)}")
    if manifest.frames:
        raise BundleError(f"{manifest.name} draws clips, whose decoder works in pieces; a loop is of pictures")
    if out.exists():
        raise BundleError(f"{out} exists; give a new file")
    files: dict[str, Path] = {
        engine.graph: bundle.file(engine.file) for engine in manifest.engines if _is_plain(engine)
    }
    if not files:
        bundle.engine("step")
    out.parent.mkdir(parents=True, exist_ok=True)
    sources = [name for name in manifest.files if name.endswith((".onnx", ".safetensors"))]
    check_room(out.parent, sum(bundle.file(name).stat().st_size for name in sources))
    model = unroll({name: onnx.load(file) for name, file in files.items()}, manifest.samplers[steps].table())
    about = {"leapfrog.bundle": manifest.name, "leapfrog.steps": str(steps), "leapfrog.digest": bundle.digest}
    helper.set_model_props(model, about)
    draft = out.with_name(out.name + ".tmp")
    try:
        draft.write_bytes(model.SerializeToString(deterministic=True))
        found = compare_loop(bundle, parity.OnnxGraph(draft), files, steps, batch)
        parity.gate(f"the picture after {steps} steps in one graph", found)
        draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)
    say(
        f"{len(model.graph.node)} nodes, {out.stat().st_size / 1e6:.1f} MB; at most {found['levels']:.0f} of 255 levels"
    )
    return [out]


def _is_plain(engine: object) -> bool:
    return (getattr(engine, "runtime", ""), getattr(engine, "precision", "")) == ("onnx", "float32")


def compare_loop(
    bundle: Bundle, loop: parity.OnnxGraph, files: dict[str, Path], steps: int, batch: int
) -> dict[str, float]:
    """Pictures of the one graph against those of the bundle's graphs one after another."""
    manifest = bundle.manifest
    specs = load_graphs(bundle.path, manifest)
    source = specs.get("text_encoder") or specs["step"]
    sampled = source.sample(batch, torch.Generator().manual_seed(0))
    first: Inputs = {name: sampled[name] for name in ("input_ids", "labels") if name in sampled}
    seeds = list(range(batch))
    graphs = {name: parity.OnnxGraph(file) for name, file in files.items()}
    expected = torch.from_numpy(parity.pictures(graphs, manifest, first, steps, seeds))
    drawn = np.stack([noise(seed, 0, manifest.latent_shape(), draws=steps + 1) for seed in seeds])
    return parity.compare(expected, loop.run(first | {"noise": torch.from_numpy(drawn)})["image"])


def unroll(graphs: dict[str, onnx.ModelProto], table: Table) -> onnx.ModelProto:
    """One graph of a text encoder (if there is one), as many steps as the table has, and a decoder."""
    step, decoder, text = graphs["step"], graphs["decoder"], graphs.get("text_encoder")
    made = _Loop(step, len(table))
    conditioning = {"labels": "labels"}
    if text is not None:
        names = [value.name for value in text.graph.output]
        made.add(text, "text.", {"input_ids": "input_ids"})
        conditioning = {name: f"text.{name}" for name in names}
    latents = made.draw(0)
    for index, (time, row) in enumerate(zip(table.timesteps, table.rows, strict=True)):
        feed = {
            "latents": latents,
            "timestep": made.per_row(f"timestep_{index}", np.asarray(time, np.float32).reshape(1)),
            "coefficients": made.per_row(f"coefficients_{index}", np.asarray(row, np.float32).reshape(1, -1)),
            "noise": made.draw(index + 1),
        }
        made.add(step, f"step{index}.", feed | conditioning, weights="step.")
        latents = f"step{index}.next"
    made.add(decoder, "decoder.", {"latents": latents, "image": "image"})
    first = text.graph.input[0] if text is not None else _input(step, "labels")
    return made.finish(first, decoder.graph.output[0])


class _Loop:
    """A graph that others are appended to under prefixes of their own; initialisers of one prefix are shared."""

    def __init__(self, step: onnx.ModelProto, steps: int) -> None:
        self._like, self._steps = step, steps
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._node("Shape", ["noise"], "shape", end=1)  # (1,), the number of rows

    def add(self, model: onnx.ModelProto, prefix: str, feed: dict[str, str], weights: str | None = None) -> None:
        """Append a graph. feed: what its inputs are called here, and outputs that are to keep a name.

        weights: prefix of initialisers that another copy of the graph may have brought already.
        """
        shared = weights or prefix
        initializers = {tensor.name for tensor in model.graph.initializer}
        fixed = _derived(model.graph.node, initializers)
        for tensor in model.graph.initializer:
            name = shared + tensor.name
            if name not in self._initializers:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = name
                self._initializers[name] = copy

        def rename(name: str) -> str:
            if not name or name in feed:
                return feed.get(name, "")
            return (shared if name in initializers or name in fixed else prefix) + name

        known = {name for node in self._nodes for name in node.output}
        for node in model.graph.node:
            if all(rename(name) in known for name in node.output):
                continue  # a cast of shared weights
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name
            copy.input[:] = [rename(name) for name in node.input]
            copy.output[:] = [rename(name) for name in node.output]
            self._nodes.append(copy)

    def draw(self, index: int) -> str:
        """Row ``index`` of every picture's noise: (B, C, h, w)."""
        self._constant(f"draw_{index}", np.array(index, np.int64))
        return self._node("Gather", ["noise", f"draw_{index}"], f"noise_{index}", axis=1)

    def per_row(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        """A constant (1, …) repeated for every picture."""
        self._constant(f"{name}_one", value)
        shape = "shape"
        if value.ndim > 1:
            self._constant(f"{name}_rest", np.array(value.shape[1:], np.int64))
            shape = self._node("Concat", ["shape", f"{name}_rest"], f"{name}_shape", axis=0)
        return self._node("Expand", [f"{name}_one", shape], name)

    def finish(self, first: onnx.ValueInfoProto, image: onnx.ValueInfoProto) -> onnx.ModelProto:
        latents = _input(self._like, "latents").type.tensor_type.shape.dim
        sides = [side.dim_param or side.dim_value for side in latents]
        shape = [sides[0], self._steps + 1, *sides[1:]]
        drawn = helper.make_tensor_value_info("noise", TensorProto.FLOAT, shape)
        result = onnx.ValueInfoProto()
        result.CopyFrom(image)
        graph = helper.make_graph(self._nodes, "leapfrog", [first, drawn], [result], list(self._initializers.values()))
        model = helper.make_model(graph, opset_imports=list(self._like.opset_import), ir_version=self._like.ir_version)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _constant(self, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
        self._initializers[name] = numpy_helper.from_array(value, name)

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output


def _derived(nodes: Sequence[onnx.NodeProto], initializers: Collection[str]) -> set[str]:
    """Values that are made of initialisers alone, and so are the same in every copy of a graph."""
    found: set[str] = set()
    for node in nodes:
        if node.input and all(name in initializers or name in found for name in node.input if name):
            found |= set(node.output)
    return found


def _input(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    found: list[onnx.ValueInfoProto] = [value for value in model.graph.input if value.name == name]
    return found[0]
