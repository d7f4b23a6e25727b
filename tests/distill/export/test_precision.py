"""Graphs in a smaller type: what is lowered, what is kept, and that the measure decides."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from distill.export.precision import (
    GROUPS,
    TYPES,
    Group,
    Reduced,
    choose_kept,
    exists_in,
    lower,
    plan,
    rounded,
    value_types,
)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """A step in small: a sinusoid of the timestep, a product with it, a norm, a product to the latents, a sum."""
    random = np.random.default_rng(0)
    weights = {
        "in.float16": random.standard_normal((8, 4, 1, 1)).astype(np.float16),
        "out.float16": random.standard_normal((4, 8, 1, 1)).astype(np.float16),
        "time.float16": (0.1 * random.standard_normal((2, 8))).astype(np.float16),
        "scale": np.ones(8, np.float32),
        "bias": np.zeros(8, np.float32),
        "frequencies": np.array([[1.0, 0.37]], np.float32),
        "shape": np.array([-1, 8, 1, 1], np.int64),
        "column": np.array([-1, 1], np.int64),
    }
    node = helper.make_node
    nodes = [
        *(
            node("Cast", [f"{n}.float16"], [n], name=f"{n}.float32", to=TensorProto.FLOAT)
            for n in ("in", "out", "time")
        ),
        node("Reshape", ["timestep", "column"], ["t"], name="0_Reshape"),
        node("Mul", ["t", "frequencies"], ["angle"], name="1_Mul"),
        node("Sin", ["angle"], ["sinusoid"], name="2_Sin"),
        node("MatMul", ["sinusoid", "time"], ["embedding"], name="3_MatMul"),
        node("Reshape", ["embedding", "shape"], ["shift"], name="4_Reshape"),
        node("Conv", ["latents", "in"], ["hidden"], name="5_Conv"),
        node("GroupNormalization", ["hidden", "scale", "bias"], ["normal"], name="6_Norm", num_groups=2),
        node("Add", ["normal", "shift"], ["shifted"], name="7_Add"),
        node("Sigmoid", ["shifted"], ["gate"], name="8_Sigmoid"),
        node("Conv", ["gate", "out"], ["output"], name="9_Conv"),
        node("Sub", ["latents", "output"], ["next"], name="10_Sub"),
    ]
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "step",
        [value("latents", TensorProto.FLOAT, ["batch", 4, 8, 8]), value("timestep", TensorProto.FLOAT, ["batch"])],
        [value("next", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, time: float = 999.0) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    (found,) = session.run(["next"], {"latents": latents, "timestep": np.full(2, time, np.float32)})
    values: NDArray[np.float32] = found
    return values


def psnr_db(found: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(np.mean((found - reference) ** 2) / np.ptp(reference) ** 2))


def names(model: onnx.ModelProto, indices: Collection[int]) -> set[str]:
    return {model.graph.node[index].name for index in indices}


def test_groups_end_where_products_begin(graph: onnx.ModelProto) -> None:
    read = plan(graph)
    assert read.weights == {"in": "in.float16", "out": "out.float16", "time": "time.float16"}
    assert names(graph, read.groups["time"]) == {"0_Reshape", "1_Mul", "2_Sin"}
    assert names(graph, read.groups["norm"]) == {"6_Norm"}
    assert names(graph, read.groups["tail"]) == {"10_Sub"}
    lowered = names(graph, read.lowered(graph, "bfloat16", GROUPS))
    assert lowered == {"3_MatMul", "4_Reshape", "5_Conv", "7_Add", "8_Sigmoid", "9_Conv"}


def test_types_are_known_behind_a_norm_and_of_indices(graph: onnx.ModelProto) -> None:
    types = value_types(graph)
    assert types["next"] == types["normal"] == TensorProto.FLOAT
    assert types["shape"] == TensorProto.INT64


def test_operators_without_a_reduced_form_are_known() -> None:
    assert exists_in("Conv", 22, "bfloat16") and exists_in("Einsum", 22, "float16")
    assert not exists_in("Einsum", 22, "bfloat16")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("keep", [GROUPS, ("norm",), ()])
def test_products_read_the_reduced_type_and_the_graph_float32(
    graph: onnx.ModelProto, precision: Reduced, keep: tuple[Group, ...]
) -> None:
    made = lower(graph, precision, keep)
    types = value_types(made)
    for node in made.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            assert {types[name] for name in node.input} == {TYPES[precision]}
    (norm,) = [node for node in made.graph.node if node.op_type == "GroupNormalization"]
    assert types[norm.input[0]] == (TensorProto.FLOAT if "norm" in keep else TYPES[precision])
    for value in (*made.graph.input, *made.graph.output):
        assert value.type.tensor_type.elem_type == types[value.name] == TensorProto.FLOAT
    assert {t.name for t in made.graph.initializer} == {t.name for t in graph.graph.initializer}


@pytest.mark.parametrize("keep", [GROUPS, ()])
def test_float16_graph_computes_what_float32_does(graph: onnx.ModelProto, keep: tuple[Group, ...]) -> None:
    """ONNX Runtime's processors compute it in float32 and drop what rounding they can, so this is about the wiring."""
    np.testing.assert_allclose(run(lower(graph, "float16", keep), 1.0), run(graph, 1.0), atol=0.02)


@pytest.mark.parametrize(("precision", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_the_measure_rounds_to_the_reduced_type(graph: onnx.ModelProto, precision: Reduced, bits: int) -> None:
    """With nothing kept the output itself is a number of that type, and the error that of its mantissa."""
    reference, found = run(graph, 1.0), run(rounded(graph, precision, ()), 1.0)
    dtype = getattr(torch, precision)
    np.testing.assert_array_equal(torch.from_numpy(found).to(dtype).float().numpy(), found)
    assert 6 * bits + 10 < psnr_db(found, reference) < 6 * bits + 30


def test_a_sinusoid_in_bfloat16_is_measured_and_kept(graph: onnx.ModelProto) -> None:
    """999·0.37 is 369.6, which bfloat16 knows to within 1: the angle is off by a tenth of a turn."""
    reference = run(graph)
    kept, found = choose_kept(lambda keep: psnr_db(run(rounded(graph, "bfloat16", keep)), reference))
    assert "time" in kept and "norm" in kept
    assert found["time"] < found["all kept"] - 3
    assert found["softmax"] == found["all kept"]  # it has none


def test_what_costs_little_is_lowered() -> None:
    cost = {"time": 0.4, "softmax": 0.6, "tail": float("nan")}

    def measure(keep: Collection[Group]) -> float:
        return 60 - sum(value for group, value in cost.items() if group not in keep)

    kept, found = choose_kept(measure)
    assert kept == ("norm", "softmax", "tail")  # infinities and NaN of float16 count as a cost
    assert found["time"] == 59.6


def test_gate_of_the_real_graph_meets_overflow(graph: onnx.ModelProto, tmp_path: Path) -> None:
    """Activations beyond 65504 are infinite in float16 and the measure sees it."""
    large = onnx.ModelProto()
    large.CopyFrom(graph)
    (tensor,) = [t for t in large.graph.initializer if t.name == "in.float16"]
    tensor.CopyFrom(numpy_helper.from_array(np.full((8, 4, 1, 1), 6e4, np.float16), tensor.name))
    assert np.isfinite(run(large)).all()
    assert not np.isfinite(run(rounded(large, "float16", GROUPS))).all()
    assert np.isfinite(run(rounded(large, "bfloat16", GROUPS))).all()
