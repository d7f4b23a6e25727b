"""torch to ONNX: one graph, a free batch, weights stored in half precision, nothing in the file but the graph.

The weights of a bundle lie in float16 on disk and compute in float32. The ONNX file keeps both: an initialiser is
float16 and cast to float32 where it is read, which loses nothing and which runtimes fold away at load. Its bytes are
those of the bundle's safetensors files, see distill.export.weights.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from distill.export.graphs import GraphSpec
from distill.export.translations import TRANSLATIONS
from distill.export.weights import Place, Weights, digest_of, sign

OPSET = 22
"""The last without Attention as an operator, which TensorRT refuses to build in float32. ONNX Runtime is as fast with
20, 22 and 23."""

HALF_BYTES = 4096
"""Initialisers of at least this many bytes in float32 are stored as float16."""

MAX_FILE_BYTES = 2**31 - 2**26
"""Protobuf's limit of 2 GiB, less what the graph itself may take."""
ALIGNMENT = 4096
"""Of weights in a file of their own, so that runtimes can map them."""

EXAMPLE_BATCH = 2
"""torch.export bakes an example size of 0 or 1 into the graph."""


class ExportError(Exception):
    """A graph that cannot be compiled or that does not reproduce torch; nothing was written."""


def compile_graph(spec: GraphSpec, path: Path, opset: int = OPSET, weights: Weights | None = None) -> None:
    """Write the graph to ``path``, through a temporary file beside it.

    weights: files below the folder of ``path``, in which initialisers are left that lie there; the others are in the
    graph. None: all are in the graph, or beyond 2 GB in ``path``.data. Raises ExportError when the exporter fails,
    fixes the batch, or a weight is not exact in float16.
    """
    parameters = {name for name, _ in spec.module.named_parameters()}
    program = trace(spec, opset)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = weights is None and weight_bytes(spec) > MAX_FILE_BYTES
    outside = store_outside(program.model, path, parameters, weights, large)
    model = program.model_proto
    clean(model)
    name_dims(model, spec)
    store_half(model, parameters)
    cast_halves(model, outside, {name for name, place in outside.items() if place.transposed})
    sign(model, outside.values())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(temporary), full_check=True)  # by its path, by which it finds weights outside
    os.replace(temporary, path)


def weight_bytes(spec: GraphSpec) -> int:
    """Of the ONNX file, which holds every parameter in float16 and little else."""
    return sum(parameter.numel() * 2 for parameter in spec.module.parameters())


def trace(spec: GraphSpec, opset: int) -> torch.onnx.ONNXProgram:
    """The exporter's graph as it comes, in memory, and the program that it was made from."""
    size = (spec.sizes[0][0], spec.sizes[-1][1]) if spec.sizes else None  # equal sides might be taken for one
    example = spec.sample(EXAMPLE_BATCH, torch.Generator().manual_seed(0), size)
    free = {
        name: {axis: torch.export.Dim.DYNAMIC for axis, side in enumerate(spec.dims[name]) if isinstance(side, str)}
        for name in spec.inputs
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                spec.module,
                tuple(example[name] for name in spec.inputs),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=_by_argument(spec, [free[name] for name in spec.inputs]),
                opset_version=opset,
                dynamo=True,
                custom_translation_table=TRANSLATIONS,
                optimize=True,
                verbose=False,
            )
    except RuntimeError as error:  # the base of the errors of tracing, translation and optimisation
        raise ExportError(f"graph {spec.name!r} does not export at opset {opset}: {error}") from error
    assert program is not None
    return program


def _by_argument(spec: GraphSpec, free: list[Any]) -> tuple[Any, ...]:
    """One entry per argument of ``forward``, of which *past is one."""
    kinds = [parameter.kind for parameter in inspect.signature(spec.module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(free)
    alone = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:alone], tuple(free[alone:]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's deprecation warnings are about itself and its progress goes to stdout; errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def clean(model: onnx.ModelProto) -> dict[str, str]:
    """Drop stack traces, doc strings and intermediate shapes; name nodes and values by their position.

    The exporter's metadata holds Python stack traces: paths of this machine, and more bytes than the graph. Returns the
    new names of values by those that the exporter gave them.
    """
    graph = model.graph
    if model.functions or any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        raise ExportError("the graph has functions or subgraphs; give a module without control flow on tensors")
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:], graph.quantization_annotation[:]
    model.doc_string = graph.doc_string = ""
    graph.name = "leapfrog"
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)} | {""}
    names: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        node.name, node.doc_string = f"{index}_{node.op_type}", ""
        del node.metadata_props[:]
        for name in node.output:
            if name not in kept:
                names[name] = f"v{len(names)}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return names


def name_dims(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Check inputs and outputs against ``spec.dims`` and give the free axes its names.

    Raises ExportError when an axis that should be free has a number: the graph would run at one size only.
    """
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    if list(values) != [*spec.inputs, *spec.outputs]:
        raise ExportError(f"graph {spec.name!r} has {list(values)}; expected {[*spec.inputs, *spec.outputs]}")
    for name, value in values.items():
        sides = value.type.tensor_type.shape.dim
        wanted = spec.dims[name]
        if len(sides) != len(wanted):
            raise ExportError(f"{spec.name}.{name} has {len(sides)} axes; expected {wanted}")
        for axis, (side, want) in enumerate(zip(sides, wanted, strict=True)):
            if isinstance(want, str):
                if not side.dim_param:
                    raise ExportError(
                        f"{spec.name}.{name} axis {axis} was fixed at {side.dim_value}; expected {want!r}"
                    )
                side.dim_param = want
            elif side.dim_value != want:
                raise ExportError(
                    f"{spec.name}.{name} axis {axis} is {side.dim_value or side.dim_param}; expected {want}"
                )


def store_half(model: onnx.ModelProto, parameters: set[str]) -> None:
    """Replace large float32 initialisers by float16 ones and a Cast each, where that is exact.

    Tables that the exporter computes (position embeddings, sinusoids) stay float32 when they are not exact.
    Raises ExportError for a parameter that is not: its bundle was not written in float16.
    """
    halves = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.data_location == onnx.TensorProto.EXTERNAL:
            continue
        half = exact_half(tensor.name, numpy_helper.to_array(tensor), parameters)
        if half is not None:
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
            halves.append(tensor.name)
    cast_halves(model, halves)


def exact_half(name: str, full: NDArray[np.float32], parameters: Collection[str]) -> NDArray[np.float16] | None:
    """A float32 tensor in float16, None where it is small or not exact. Raises ExportError as store_half does."""
    if name in parameters and not np.isfinite(full).all():
        raise ExportError(f"{name} holds NaN or infinity; train the student again")
    if full.nbytes < HALF_BYTES:
        return None
    with np.errstate(over="ignore"):
        half = full.astype(np.float16)
    back = half.astype(np.float32)
    if np.array_equal(back, full):
        return half
    if name in parameters:
        worst = float(np.abs(back - full).max())
        raise ExportError(f"{name} changes by up to {worst:.3g} in float16; save the bundle's weights as float16 first")
    return None


def cast_halves(model: onnx.ModelProto, names: Collection[str], transposed: Collection[str] = ()) -> None:
    """Rename float16 initialisers to name.float16 and cast them to float32 under their names, ``transposed`` turned."""
    chosen, casts = set(names), []
    for tensor in model.graph.initializer:
        if tensor.name in chosen:
            name, tensor.name = tensor.name, f"{tensor.name}.float16"
            full, to = f"{name}.T" if name in transposed else name, onnx.TensorProto.FLOAT
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [full], name=f"{full}.float32", to=to))
            if full != name:
                turn = onnx.helper.make_node("Transpose", [full], [name], name=f"{name}.turned", perm=[1, 0])
                casts.append(turn)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def store_outside(
    model: ir.Model, path: Path, parameters: Collection[str], weights: Weights | None, large: bool
) -> dict[str, Place]:
    """Leave large initialisers in other files as float16 and refer to them; returns where by name.

    Those of ``weights`` stay where they are; ``large``: the others are written to ``path``.data, one at a time.
    The exporter's own tensors are views of torch's parameters, so that no second copy of the weights is ever held.
    """
    file, stored = path.with_name(path.name + ".data"), dict[str, Place]()
    with _removed_unless_filled(file), file.open("wb") as data:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT:
                continue
            half = exact_half(name, tensor.numpy(), parameters)
            place = None if half is None or weights is None else weights.find(half)
            if half is not None and place is None and large:
                data.write(bytes(-data.tell() % ALIGNMENT))
                place = Place(file.name, data.tell(), half.nbytes, digest_of(half))
                data.write(half.tobytes())
            if place is None:
                continue
            sides = tensor.shape.numpy()
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.length,
                ir.DataType.FLOAT16,
                shape=ir.Shape(sides[::-1] if place.transposed else sides),
                name=name,
                base_dir=path.parent,
            )
            stored[name] = place
    return stored


@contextlib.contextmanager
def _removed_unless_filled(file: Path) -> Iterator[None]:
    """Leave no file behind that is empty, or only begun when an error came."""
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    if not file.stat().st_size:
        file.unlink()
