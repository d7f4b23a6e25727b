"""Graphs read their weights from the safetensors files of the bundle: stored once, found by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file, save_file

from distill.bundle import Bundle, sha256, write_manifest
from distill.export.graphs import load_graphs
from distill.export.onnx import compile_graph
from distill.export.run import export_onnx
from distill.export.weights import SIGNATURE, Weights, graph_bytes
from service.runtimes import OnnxRuntime, generate

PROMPTS, SEEDS = ["a red cube", "a small blue metal sphere"], [3, 4]


def references(graph: Path) -> dict[str, tuple[str, int, int]]:
    """(file, offset, length) by name of the float16 initialisers of a graph; none may lie in it."""
    model = onnx.load(graph, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            assert tensor.data_location == TensorProto.EXTERNAL and not tensor.raw_data, tensor.name
            entry = {item.key: item.value for item in tensor.external_data}
            found[tensor.name] = (entry["location"], int(entry["offset"]), int(entry["length"]))
    return found


def test_tensors_are_found_by_their_bytes_as_they_are_or_transposed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix, cube = (random.standard_normal(shape).astype(np.float16) for shape in ((3, 5), (2, 3, 7)))
    full = random.standard_normal((4, 4)).astype(np.float32)
    save_file({"a": np.ones(3, np.float16), "b": matrix, "c": full}, tmp_path / "one.safetensors")
    (tmp_path / "sub").mkdir()
    save_file({"d": cube}, tmp_path / "sub" / "two.safetensors", metadata={"format": "pt"})
    weights = Weights(tmp_path, ["one.safetensors", "sub/two.safetensors"])

    def read(file: str, offset: int, length: int) -> np.ndarray:
        return np.frombuffer((tmp_path / file).read_bytes()[offset : offset + length], np.float16)

    for sought, kept, turned, file in (
        (matrix, matrix, False, "one.safetensors"),
        (np.ascontiguousarray(matrix.T), matrix, True, "one.safetensors"),
        (cube, cube, False, "sub/two.safetensors"),
        (cube.reshape(6, 7, 1), cube, False, "sub/two.safetensors"),
    ):
        place = weights.find(sought)
        assert place is not None and (place.file, place.transposed) == (file, turned)
        np.testing.assert_array_equal(read(place.file, place.offset, place.length), kept.ravel())
    assert weights.find(matrix + np.float16(1)) is None
    assert weights.find(full.astype(np.float16)) is None  # float32 there: other bytes


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_video_bundle"])
def test_no_weight_is_stored_twice(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(fixture))
    sources = {name for name in bundle.manifest.files if name.endswith(".safetensors")}
    for engine in bundle.manifest.engines:
        graph = bundle.file(engine.file)
        assert {file for file, _, _ in references(graph).values()} <= sources
        onnx.checker.check_model(str(graph), full_check=True)
    assert references(bundle.file(bundle.engine("step").file))


def test_both_decoders_of_clips_read_the_same_bytes(tiny_video_bundle: Path) -> None:
    first, following = (set(references(tiny_video_bundle / f"decoder{end}.onnx").values()) for end in ("", "_next"))
    assert first and first == following


def test_another_student_is_another_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its nodes are the same, and what was built from the one must not be taken for the other."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    largest = max((name for name in tensors if name.startswith("decoder.")), key=lambda name: tensors[name].size)
    tensors[largest] = tensors[largest] * np.float16(0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    bundle = write_manifest(root, Bundle.open(tiny_bundle).manifest)
    spec = load_graphs(root, bundle.manifest)["decoder"]
    compile_graph(spec, root / "decoder.onnx", weights=Weights.of(bundle))
    ours, theirs = (onnx.load(folder / "decoder.onnx", load_external_data=False) for folder in (root, tiny_bundle))
    assert [entry.key for entry in ours.metadata_props] == [SIGNATURE]
    assert ours.metadata_props[0].value != theirs.metadata_props[0].value
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert sha256(root / "decoder.onnx") != sha256(tiny_bundle / "decoder.onnx")


def test_graphs_that_hold_their_weights_still_load_and_an_export_replaces_them(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """As bundles were written before: in a folder of their own, every weight in the file."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    (root / "onnx").mkdir()
    engines = []
    for engine in Bundle.open(tiny_bundle).manifest.engines:
        model = onnx.load(root / engine.file, load_external_data=False)
        load_external_data_for_model(model, str(root))
        (root / engine.file).unlink()
        onnx.save(model, root / "onnx" / engine.file)
        engines.append(engine.model_copy(update={"file": f"onnx/{engine.file}"}))
    old = write_manifest(root, Bundle.open(tiny_bundle).manifest.model_copy(update={"engines": tuple(engines)}))
    before, after = (
        generate(OnnxRuntime(bundle, threads=1, max_batch=2), bundle.manifest, PROMPTS, SEEDS, steps=2)
        for bundle in (old, Bundle.open(tiny_bundle))
    )
    np.testing.assert_array_equal(before, after)
    new = export_onnx(root, say=lambda line: None)
    assert {engine.file for engine in new.manifest.engines} == {"text_encoder.onnx", "step.onnx", "decoder.onnx"}
    assert not (root / "onnx").exists()
    assert new.digest == Bundle.open(tiny_bundle).digest == Bundle.open(root).digest


def test_a_graph_whose_weights_are_of_another_student_does_not_open(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    file = root / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Exception, match=r"diffusion_pytorch_model\.safetensors was altered"):
        Bundle.open(root)


def test_weights_that_lie_transposed_are_turned_back(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "step.onnx")
    turned = {node.input[0]: node.output[0] for node in model.graph.node if node.name.endswith(".turned")}
    assert turned
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    spec = load_graphs(tiny_bundle, Bundle.open(tiny_bundle).manifest)["step"]
    theirs = {value.half().numpy().tobytes() for value in spec.module.parameters()}
    for full in turned:
        assert stored[full.removesuffix(".T") + ".float16"].tobytes() in theirs


def test_a_graph_is_as_large_as_itself_and_what_it_reads(tmp_path: Path) -> None:
    matrix = numpy_helper.from_array(np.ones((64, 64), np.float16), "matrix")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["matrix"], ["out"])],
        "one",
        [],
        [onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT16, [64, 64])],
        [matrix],
    )
    model = onnx.helper.make_model(graph)
    onnx.save(model, tmp_path / "inside.onnx")
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="data", size_threshold=0)
    assert graph_bytes(tmp_path / "inside.onnx") == (tmp_path / "inside.onnx").stat().st_size
    assert graph_bytes(tmp_path / "outside.onnx") == (tmp_path / "outside.onnx").stat().st_size + 64 * 64 * 2
