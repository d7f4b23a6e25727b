"""What every runtime over graphs owes: rows that do not depend on their batch, and refusals that name the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from distill.bundle import Bundle, BundleError, write_manifest
from distill.sampling import noise
from service.runtimes import OnnxRuntime, generate, open_runtime
from service.runtimes.base import FixedPrecision, RuntimeName
from service.runtimes.graphs import GraphRuntime
from service.runtimes.openvino import OpenVinoRuntime, has_bfloat16

PROMPTS = (
    "a red cube",
    "a large blue metal sphere left of a small green cylinder",
    "Zebra — 3 naïve cats!",
    "  a  RED\ncube ",
    "x",
)

KINDS: list[tuple[RuntimeName, FixedPrecision]] = [
    ("onnx", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def runtime(request: pytest.FixtureRequest, tiny_bundle: Path) -> GraphRuntime:
    name, precision = request.param
    if precision == "bfloat16" and not has_bfloat16():
        pytest.skip("this processor does not multiply in bfloat16")
    opened = open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=8, runtime=name, precision=precision)
    assert isinstance(opened, GraphRuntime)
    assert (opened.capabilities.runtime, opened.capabilities.precision) == request.param
    return opened


def feed(runtime: GraphRuntime, rows: int) -> dict[str, NDArray[np.generic]]:
    """Inputs of ``rows`` rows that stand at different steps of different samplers."""
    tables = [runtime.manifest.samplers[steps].table() for steps in (1, 2, 4, 8)]
    at = [(tables[i % 4], i % len(tables[i % 4])) for i in range(rows)]
    conditioning = runtime.encode_text([PROMPTS[i % len(PROMPTS)] for i in range(rows)])
    return {
        "latents": np.stack([noise(i, 0, (4, 16, 16))[0] for i in range(rows)]),
        "timestep": np.array([table.timesteps[k] for table, k in at]),
        "coefficients": np.stack([table.rows[k] for table, k in at]),
        "noise": np.stack([noise(i, 1, (4, 16, 16))[0] for i in range(rows)]),
        "conditioning": conditioning,  # type: ignore[dict-item]
    }


def take(inputs: dict[str, NDArray[np.generic]], rows: list[int]) -> dict[str, NDArray[np.generic]]:
    conditioning = {name: value[rows] for name, value in inputs["conditioning"].items()}  # type: ignore[attr-defined]
    return {n: conditioning if n == "conditioning" else v[rows] for n, v in inputs.items()}  # type: ignore[misc]


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 11])
def test_each_row_of_a_step_equals_the_row_alone(runtime: GraphRuntime, rows: int) -> None:
    inputs = feed(runtime, rows)
    together = runtime.step(**inputs)  # type: ignore[arg-type]
    for i in range(rows):
        alone = runtime.step(**take(inputs, [i]))  # type: ignore[arg-type]
        for batch, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(batch[i], single[0])


def test_a_row_does_not_see_its_neighbours(runtime: GraphRuntime) -> None:
    inputs = feed(runtime, 8)
    first, _ = runtime.step(**take(inputs, [0, 1, 2, 3]))  # type: ignore[arg-type]
    other, _ = runtime.step(**take(inputs, [7, 0, 6, 5]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(first[0], other[1])


def test_pictures_depend_on_prompt_seed_and_steps(runtime: GraphRuntime) -> None:
    base, again, seed = generate(runtime, runtime.manifest, ["a red cube"] * 3, [1, 1, 2], steps=4)
    np.testing.assert_array_equal(base, again)
    assert base.shape == (64, 64, 3)
    assert base.dtype == np.uint8
    prompt = generate(runtime, runtime.manifest, ["a blue sphere"], [1], steps=4)[0]
    steps = generate(runtime, runtime.manifest, ["a red cube"], [1], steps=2)[0]
    for other in (seed, prompt, steps):
        assert not np.array_equal(base, other)


def test_capabilities_list_sizes_from_one(runtime: GraphRuntime) -> None:
    able = runtime.capabilities
    assert able.batch_sizes[0] == 1
    assert able.max_batch <= 8
    assert len(able.step_ms) == len(able.batch_sizes)


def replace_step(source: Path, target: Path, nodes: list[onnx.NodeProto]) -> Bundle:
    """A copy of a bundle whose step graph is ``nodes`` from the usual inputs to next and x0."""
    shutil.copytree(source, target)
    bundle = Bundle.open(target)
    old = onnx.load(target / bundle.engine("step").file).graph
    graph = helper.make_graph(nodes, "step", old.input, old.output)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target / bundle.engine("step").file)
    return write_manifest(target, bundle.manifest)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVinoRuntime])
def test_batch_sizes_that_change_a_bit_are_not_used(
    tiny_bundle: Path, tmp_path: Path, kind: type[OnnxRuntime] | type[OpenVinoRuntime]
) -> None:
    """A graph that adds a hair when four rows are computed together: 4 is refused, 8 rows run in twos."""
    zero, one = (
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    )
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["hair"], value_float=1e-3),
        helper.make_node("Shape", ["latents"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["rows_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["rows_float", "two"], ["beyond"]),
        helper.make_node("Relu", ["beyond"], ["excess"]),
        helper.make_node("Mul", ["excess", "hair"], ["error"]),
        helper.make_node("Add", ["latents", "error"], ["next"]),
        helper.make_node("Identity", ["latents"], ["x0"]),
    ]
    bundle = replace_step(tiny_bundle, tmp_path / "drifting", nodes)
    runtime = kind(bundle, threads=1, max_batch=8)
    assert set(runtime.capabilities.batch_sizes) <= {1, 2}
    inputs = feed(runtime, 8)
    advanced, _ = runtime.step(**inputs)  # type: ignore[arg-type]
    np.testing.assert_array_equal(advanced, inputs["latents"])


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVinoRuntime])
@pytest.mark.parametrize("damage", ["not a graph", "half"])
def test_a_graph_that_does_not_load_is_named(
    tiny_bundle: Path, tmp_path: Path, kind: type[OnnxRuntime] | type[OpenVinoRuntime], damage: str
) -> None:
    target = tmp_path / "broken"
    shutil.copytree(tiny_bundle, target)
    bundle = Bundle.open(target)
    file = target / bundle.engine("decoder").file
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "half" else damage.encode())
    rewritten = write_manifest(target, bundle.manifest)
    with pytest.raises(BundleError, match=r"decoder.*does not load in .*; export the bundle again$"):
        kind(rewritten, threads=1, max_batch=1)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVinoRuntime])
def test_a_bundle_without_engines_names_the_export_command(
    tiny_sources: Path, kind: type[OnnxRuntime] | type[OpenVinoRuntime]
) -> None:
    with pytest.raises(BundleError, match=r"python -m distill\.export"):
        kind(Bundle.open(tiny_sources), threads=1, max_batch=1)
