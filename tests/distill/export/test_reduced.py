"""A bundle's graphs in smaller precisions, compared with torch and named for what they are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from distill.bundle import Bundle, BundleError, sha256
from distill.export import parity
from distill.export.__main__ import main
from distill.export.onnx import ExportError
from distill.export.quantize import spared, with_float_weights
from distill.export.reduced import Smaller, export_reduced
from distill.export.run import outdated
from service.runtimes import open_runtime


def listing(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    return root


def assert_described(root: Path, before: Bundle, precision: Smaller, graphs: set[str], status: str) -> Bundle:
    """The manifest says of a bundle's new graphs what they are, and the others are as they were."""
    bundle = Bundle.open(root)
    made = [engine for engine in bundle.manifest.engines if engine.precision == precision]
    assert {engine.graph for engine in made} == graphs
    for engine in made:
        assert engine.status == status
        assert (engine.parity == {}) == (status == "built")
        assert bundle.file(engine.file).name == f"{engine.graph}.{precision}.onnx"
    assert bundle.engine("step") == before.engine("step")
    step = bundle.engine("step", "onnx", precision)
    assert ("time" in step.kept and "norm" in step.kept) == (precision != "int8")
    pictures = bundle.manifest.provenance[f"export_onnx_{precision}"]["pictures"]
    assert set(pictures) == {"1", "2", "4", "8"}
    least = parity.TOLERANCES[precision].picture_db
    assert all(least <= row["psnr_db"] < 120 for row in pictures.values())
    return bundle


def test_bfloat16_graphs_lie_beside_the_others(copy: Path) -> None:
    before = Bundle.open(copy)
    bundle = export_reduced(copy, "bfloat16", say=lambda line: None)
    assert assert_described(copy, before, "bfloat16", {"step", "decoder"}, "built").manifest == bundle.manifest


def test_int8_weights_are_stored_in_int8_but_for_the_ends_and_the_timestep(copy: Path) -> None:
    before = Bundle.open(copy)
    export_reduced(copy, "int8", say=lambda line: None)
    bundle = assert_described(copy, before, "int8", {"step"}, "candidate")
    whole = onnx.load(bundle.file("step.onnx"))
    model = onnx.load(bundle.file("step.int8.onnx"))
    products = [node for node in with_float_weights(whole).graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    convolutions = [node.name for node in products if node.op_type == "Conv"]
    excluded = spared(with_float_weights(whole))
    assert excluded[-2:] == [convolutions[0], convolutions[-1]]
    assert 2 < len(excluded) < len(products) / 2
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    quantised = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in dequantised]
    assert len(quantised) == len(products) - len(excluded)
    runtime = open_runtime(bundle, threads=1, max_batch=1, precision="int8")
    assert (runtime.capabilities.runtime, runtime.capabilities.precision) == ("onnx", "int8")


def test_beyond_the_tolerance_nothing_is_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(copy)
    strict = replace(parity.TOLERANCES["float16"], psnr_db=150.0)
    monkeypatch.setitem(parity.TOLERANCES, "float16", strict)
    with pytest.raises(ExportError, match=r"psnr_db .*, asked for 150; nothing was written, try --precision float32"):
        export_reduced(copy, "float16", say=lambda line: None)
    assert listing(copy) == before


def test_a_bundle_without_graphs_names_the_command(tiny_sources: Path) -> None:
    with pytest.raises(BundleError, match=r"no onnx engine for 'text_encoder'; run: .* --to onnx"):
        export_reduced(tiny_sources, "float16")


def test_a_precision_that_a_bundle_lacks_names_the_command(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"for 'step' in int8; run: .* --to onnx --precision int8"):
        open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, precision="int8")


def test_other_graphs_outdate_what_was_made_of_the_old_ones(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(copy)
    assert main([str(copy), "--to", "onnx", "--precision", "float16"]) == 0
    printed = capsys.readouterr().out
    assert_described(copy, before, "float16", {"step", "decoder"}, "built")
    assert f"wrote {copy / 'step.float16.onnx'}" in printed and "norm in float32" in printed
    manifest = Bundle.open(copy).manifest
    digests = {engine.file: manifest.files[engine.file] for engine in manifest.engines if engine.precision == "float32"}
    assert outdated(manifest, digests) == []
    gone = outdated(manifest, digests | {"step.onnx": "0" * 64})
    assert [engine.file for engine in gone] == ["step.float16.onnx", "decoder.float16.onnx"]
