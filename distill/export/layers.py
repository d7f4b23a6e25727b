"""Where a compiled graph and torch part: the first value of the graph that differs, and the layer that computes it.

The exporter names values after the nodes of its program, which runs in torch; so a value of the ONNX file and one of
torch are compared under one name. Only a graph that failed its gate is looked at, a piece at a time: a piece's values
become outputs of the graph, so that no more of them are held than one piece has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from distill.export import parity
from distill.export.graphs import GraphSpec, Inputs
from distill.export.onnx import EXAMPLE_BATCH, MAX_FILE_BYTES, ExportError, clean, trace, weight_bytes

PIECE = 64
"""Values that are compared at a time."""
PARTED = 1e-4
"""Greatest difference over the range of a value, beyond which it counts as another."""


@dataclass(frozen=True)
class Layer:
    """One value of the graph: where torch computes it and how far the graph's is from it."""

    node: str
    module: str
    relative: float

    def __str__(self) -> str:
        return f"they part first at {self.module or 'the inputs'} (node {self.node}, relative {self.relative:.2g})"


def first_difference(spec: GraphSpec, file: Path, opset: int) -> str:
    """A sentence that names the first layer of an ONNX file that does not compute what torch does."""
    if weight_bytes(spec) > MAX_FILE_BYTES:
        return "the graph is beyond 2 GB, too large to be looked into layer by layer"
    program = trace(spec, opset)
    assert program.exported_program is not None, "the exporter that keeps no program is never asked"
    names = clean(program.model_proto)
    model = onnx.load(file)
    inputs = spec.sample(EXAMPLE_BATCH, torch.Generator().manual_seed(1), spec.sizes[0] if spec.sizes else None)
    recorder = Recorder(program.exported_program)
    for layer in differences(model, recorder, {new: old for old, new in names.items()}, inputs):
        if not layer.relative <= PARTED:
            return str(layer)
    return "every layer alone is within its tolerance, the difference builds up along the way"


def differences(
    model: onnx.ModelProto, recorder: Recorder, torch_names: dict[str, str], inputs: Inputs
) -> Iterator[Layer]:
    """Every value of the graph that torch has too, in the order of computation."""
    known = [
        (node, name) for node in model.graph.node for name in node.output if torch_names.get(name) in recorder.modules
    ]
    for start in range(0, len(known), PIECE):
        piece = known[start : start + PIECE]
        found = run_with_outputs(model, [name for _, name in piece], inputs)
        expected = recorder.run(inputs, {torch_names[name] for _, name in piece})
        for node, name in piece:
            theirs = expected[torch_names[name]]
            if theirs.is_floating_point() and theirs.numel() > 0:
                yield Layer(node.name, recorder.modules[torch_names[name]], _relative(theirs, found[name]))


def run_with_outputs(model: onnx.ModelProto, names: list[str], inputs: Inputs) -> dict[str, torch.Tensor]:
    """The values of an ONNX graph under their names; only what they need is computed."""
    piece = onnx.ModelProto()
    piece.CopyFrom(model)
    del piece.graph.output[:]
    piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        raise ExportError(f"the graph does not load: {str(error).splitlines()[0]}") from None
    values = session.run(names, {value.name: inputs[value.name].numpy() for value in session.get_inputs()})
    return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, values, strict=True)}


class Recorder:
    """An exported program in torch, of which chosen values are kept."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._users = set(program.graph_signature.user_inputs)
        self.modules = {node.name: _module_of(node) for node in program.graph.nodes if node.op == "call_function"}
        """The module that computes a value, by the value's name."""

    @torch.no_grad()
    def run(self, inputs: Inputs, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        class Keeping(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                if n.name in wanted and isinstance(value, torch.Tensor):
                    kept[n.name] = value
                return value

        signature, given = self._program.graph_signature, iter(inputs.values())
        tensors = self._program.state_dict | self._program.constants
        lifted = (
            signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
        )
        arguments = [
            tensors[lifted[node.name]] if node.name in lifted else next(given)
            for node in self._program.graph.nodes
            if node.op == "placeholder"
        ]
        Keeping(self._program.graph_module).run(*arguments)
        return kept


def _module_of(node: torch.fx.Node) -> str:
    """The path of the innermost module that a node belongs to: unet.conv_in."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path), "")


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    whole = (tensor.float().reshape(1, -1) for tensor in (expected, found))
    return parity.compare(*whole)["relative"]
