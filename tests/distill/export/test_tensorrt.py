"""Engines are built from a bundle's graphs, in a child process, and say that nobody has run them yet."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distill.bundle import Bundle, BundleError, Engine, Manifest, sha256, write_manifest
from distill.engines.tensorrt import INSTALL, installed, package
from distill.export import check, tensorrt
from distill.export.__main__ import main
from distill.export.build import BuildError, Reply, Request, build
from distill.export.onnx import ExportError
from distill.export.tensorrt import export_tensorrt, onnx_engines, profile_shapes, run_builder

REPOSITORY = Path(__file__).parents[3]
rtx = pytest.mark.skipif("tensorrt-rtx" not in installed(), reason="run: pip install 'leapfrog[rtx]'")


def listing(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    return root


@pytest.fixture
def with_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed", lambda: ["tensorrt-rtx"])


def source(shape: tuple[int | str, ...], **changes: Any) -> Engine:
    given = {"graph": "decoder", "file": "decoder.onnx", "opset": 22, "outputs": {}, "parity": {}}
    return Engine(inputs={"latents": shape}, **(given | changes))


# --- what is asked of the builder ------------------------------------------------------------------------------


def test_profiles_follow_the_declared_sizes(manifest: Manifest) -> None:
    sizes = manifest.model_copy(update={"sizes": ((64, 96), (128, 64), (96, 96))})
    shapes = profile_shapes(source(("batch", 4, "height", "width")), sizes, (1, 2, 16))
    assert shapes == {"latents": ((1, 4, 16, 16), (2, 4, 24, 16), (16, 4, 24, 32))}
    assert profile_shapes(source(("batch", 4, 16, 16)), manifest) == {
        "latents": ((1, 4, 16, 16), (4, 4, 16, 16), (8, 4, 16, 16))
    }
    clips = manifest.model_copy(update={"frames": (17, 33), "frame_stride": 4, "fps": 8.0})
    assert profile_shapes(source(("batch", 4, "frames", 16, 16)), clips)["latents"][2] == (8, 4, 9, 16, 16)
    with pytest.raises(ExportError, match=r"latents has a free axis 'height_0'; export clips of one size"):
        profile_shapes(source(("batch", 4, "height_0", 16)), clips)
    with pytest.raises(ExportError, match=r"rows is \(2, 1, 8\); give least <= usual <= greatest"):
        profile_shapes(source(("batch", 4, 16, 16)), manifest, (2, 1, 8))


def test_an_opset_that_tensorrt_does_not_build_is_refused(copy: Path) -> None:
    manifest = Bundle.open(copy).manifest
    newer = tuple(engine.model_copy(update={"opset": 23}) for engine in manifest.engines)
    bundle = write_manifest(copy, manifest.model_copy(update={"engines": newer}))
    with pytest.raises(ExportError, match=r"of opset 23 and TensorRT is built from 22 at most; run: .* --opset 22"):
        onnx_engines(bundle, "float32")


def test_a_bundle_without_graphs_names_the_command(tiny_sources: Path) -> None:
    with pytest.raises(BundleError, match=r"no onnx engine for 'step'; run: python -m distill\.export .* --to onnx"):
        export_tensorrt(tiny_sources)


# --- what can go wrong -----------------------------------------------------------------------------------------


def test_without_tensorrt_the_install_line_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorrt, "installed", list)
    before = listing(copy)
    assert main([str(copy), "--to", "tensorrt"]) == 1
    assert f"TensorRT is not installed; run: {INSTALL}" in capsys.readouterr().err
    assert listing(copy) == before


@pytest.mark.usefixtures("with_rtx")
@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (subprocess.CompletedProcess([], -signal.SIGSEGV, "", ""), r"crashed on text_encoder after 0 s \(SIGSEGV\)"),
        (
            subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError"),
            r"crashed on text_encoder .*\(MemoryError\)",
        ),
        (
            subprocess.CompletedProcess([], 0, '{"error": "GroupNorm: unsupported"}', ""),
            "does not build text_encoder: GroupNorm: unsupported; nothing was written",
        ),
    ],
)
def test_a_builder_that_fails_leaves_the_bundle_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch, ended: subprocess.CompletedProcess[str], message: str
) -> None:
    before = listing(copy)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: ended)
    with pytest.raises(ExportError, match=message):
        export_tensorrt(copy)
    assert listing(copy) == before
    assert not (copy / "tensorrt-rtx").exists()
    Bundle.open(copy)


@pytest.mark.usefixtures("with_rtx")
def test_check_without_a_gpu_says_how_to_build_only(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise check.CudaUnavailable("libcuda.so.1 is not found: no NVIDIA driver is installed")

    monkeypatch.setattr(check, "find_gpu", no_gpu)
    with pytest.raises(ExportError, match=r"has no NVIDIA GPU \(libcuda.*\); leave --check out to build only"):
        export_tensorrt(copy, check=True)


@pytest.mark.usefixtures("with_rtx")
def test_a_disk_that_fills_while_an_engine_is_written_leaves_the_bundle_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(copy)

    def build_and_fill(request: Request) -> Reply:
        Path(request.engine).write_bytes(b"half an engine")
        raise OSError(28, "No space left on device", request.engine)

    monkeypatch.setattr(tensorrt, "run_builder", build_and_fill)
    assert main([str(copy), "--to", "tensorrt"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert listing(copy) == before


# --- the builder itself ----------------------------------------------------------------------------------------


@rtx
def test_engines_of_a_bundle_are_built_and_say_that_nobody_ran_them(copy: Path) -> None:
    said: list[str] = []
    bundle = export_tensorrt(copy, rows=(1, 2, 4), say=said.append)
    engines = [engine for engine in bundle.manifest.engines if engine.runtime == "tensorrt-rtx"]
    assert [engine.graph for engine in engines] == ["text_encoder", "step", "decoder"]
    for engine in engines:
        assert (engine.status, engine.parity) == ("built", {})
        assert engine.target is not None
        assert engine.target.version == package("tensorrt-rtx").__version__
        assert engine.target.source == bundle.manifest.files[f"{engine.graph}.onnx"]
        assert bundle.file(engine.file).stat().st_size > 10_000
        assert all(greatest[0] == 4 for _, _, greatest in engine.target.shapes.values())
    assert "built, not executed" in said[-1]
    assert Bundle.open(copy).engine("step").status == "verified"
    again = export_tensorrt(copy, rows=(1, 2, 4), say=said.append)
    assert len(again.manifest.engines) == len(bundle.manifest.engines)


@rtx
@pytest.mark.parametrize("name", ["scenes-sdxl", "digits-sit", "scenes-wan"])
def test_every_graph_of_the_embedded_bundles_is_taken(name: str, tmp_path: Path) -> None:
    bundle = Bundle.open(REPOSITORY / "bundles" / name)
    for onnx in onnx_engines(bundle, "float32"):
        shapes = profile_shapes(onnx, bundle.manifest)
        target = tmp_path / f"{onnx.graph}.engine"
        reply = run_builder(tensorrt.request_for(bundle, onnx, "tensorrt-rtx", shapes, target))
        assert reply.architecture == "sm80+"
        assert target.stat().st_size > 100_000


@rtx
def test_a_graph_that_is_none_is_refused_in_the_parsers_words(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"not a graph")
    request = Request("tensorrt-rtx", str(tmp_path / "step.onnx"), str(tmp_path / "step.engine"), {})
    with pytest.raises(BuildError, match=r"(?i)parse|model"):
        build(request)
    with pytest.raises(ExportError, match=r"does not build step: .*; nothing was written"):
        run_builder(request)
    assert not (tmp_path / "step.engine").exists()


@rtx
def test_an_input_without_shapes_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    request = Request("tensorrt-rtx", str(tiny_bundle / "decoder.onnx"), str(tmp_path / "engine"), {})
    with pytest.raises(BuildError, match=r"input latents has free axes \(-1, 4, 16, 16\) and no shapes were given"):
        build(request)
