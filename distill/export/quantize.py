"""The denoiser in int8: static, per channel, calibrated on what the student itself meets while it draws.

Products become QuantizeLinear → product → DequantizeLinear (QDQ, ONNX Runtime's static quantisation): weights in int8
per output channel, activations in uint8 with the range that the calibration saw. The first and the last product, which
touch latents and pixels, and everything that depends on the timestep alone stay in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from distill.bundle import Manifest
from distill.export.graphs import GraphSpec, Inputs
from distill.export.parity import Compiled
from distill.export.precision import PRODUCTS, plan, value_types
from distill.sampling import noise

QUANTISED = ("Conv", "MatMul", "Gemm")


def calibration(
    manifest: Manifest, specs: Mapping[str, GraphSpec], graphs: Mapping[str, Compiled], rows: int = 8
) -> list[Inputs]:
    """Inputs of the step at every step of every sampler, as the float32 student meets them, ``rows`` at a time."""
    generator = torch.Generator().manual_seed(0)
    source = specs.get("text_encoder") or specs["step"]
    drawn = source.sample(rows, generator)
    conditioning = graphs["text_encoder"].run(drawn) if "text_encoder" in specs else {"labels": drawn["labels"]}
    found = []
    for _, sampler in sorted(manifest.samplers.items()):
        table = sampler.table()
        draws = torch.from_numpy(
            np.stack([noise(seed, 0, manifest.latent_shape(), draws=len(table) + 1) for seed in range(rows)])
        )
        latents = draws[:, 0]
        for step in range(len(table)):
            inputs = {
                "latents": latents,
                "timestep": torch.full((rows,), float(table.timesteps[step])),
                "coefficients": torch.from_numpy(np.repeat(table.rows[step : step + 1], rows, axis=0)),
                "noise": draws[:, step + 1],
                **conditioning,
            }
            found.append(inputs)
            latents = graphs["step"].run(inputs)["next"]
    return found


def quantize(model: onnx.ModelProto, calls: Sequence[Inputs], folder: Path) -> onnx.ModelProto:
    """The graph with its products in int8. calls: what it is calibrated on; folder: for the files of the quantiser."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Calls(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Inputs] = iter(calls)

        def get_next(self) -> dict[str, Any] | None:
            inputs = next(self._left, None)
            return None if inputs is None else {name: value.numpy() for name, value in inputs.items()}

    whole = with_float_weights(model)
    source, target = folder / "float32.onnx", folder / "int8.onnx"
    onnx.save(whole, source)
    level = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.ERROR)  # it recommends preprocessing, which renames everything
        quantize_static(
            source,
            target,
            Calls(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=spared(whole),
        )
    finally:
        logging.getLogger().setLevel(level)
    made: onnx.ModelProto = onnx.load(target)
    del made.graph.value_info[:], made.metadata_props[:]
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    return made


def spared(model: onnx.ModelProto) -> list[str]:
    """Names of the products that stay in float32: the latents' first, the last, and those of the timestep alone."""
    behind = {value.name: frozenset({value.name}) for value in model.graph.input}
    products: dict[str, frozenset[str]] = {}
    for node in model.graph.node:
        reads = frozenset[str]().union(*(behind.get(name, frozenset()) for name in node.input))
        behind |= dict.fromkeys(node.output, reads)
        if node.op_type in PRODUCTS:
            products[node.name] = reads
    timed = [name for name, reads in products.items() if reads == {"timestep"}]
    on_latents = [name for name, reads in products.items() if "latents" in reads]
    return [*timed, on_latents[0], on_latents[-1]]


def with_float_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with float32 initialisers instead of float16 ones and casts, and the type of every value written."""
    weights = plan(model).weights
    made = onnx.ModelProto()
    made.CopyFrom(model)
    names = {half: full for full, half in weights.items()}
    for tensor in made.graph.initializer:
        if tensor.name in names:
            full = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(full, names[tensor.name]))
    nodes = []
    for node in made.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:  # the quantiser takes initialisers for weights
            tensor = next(tensor for tensor in made.graph.initializer if tensor.name == node.input[0])
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), node.output[0]))
        elif node.output[0] not in weights:
            nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    known = {value.name for value in (*made.graph.input, *made.graph.output)}
    known |= {tensor.name for tensor in made.graph.initializer}
    made.graph.value_info.extend(
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in value_types(made).items()
        if name and name not in known and kind != TensorProto.UNDEFINED
    )
    return made
