"""Which engine fits which machine, and what is said of one that does not."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import pytest

from distill.bundle import Bundle, Engine, Target, write_manifest
from distill.engines import tensorrt as module
from distill.engines.cuda import CudaUnavailable, Gpu
from distill.engines.tensorrt import EngineRefused, check_shape, fitting, mismatch, package, platform_name, runs_on

H100, RTX4090, T4 = Gpu("H100", (9, 0)), Gpu("RTX 4090", (8, 9)), Gpu("T4", (7, 5))
VERSION = "1.7.1.116"


@pytest.mark.parametrize(
    ("architecture", "gpu", "fits"),
    [
        ("sm90", H100, True),
        ("sm90", RTX4090, False),
        ("sm89", RTX4090, True),
        ("sm80", RTX4090, False),  # TensorRT's engines are not for the newer GPU unless built so
        ("sm80+", RTX4090, True),
        ("sm80+", T4, False),
        ("sm80+", H100, False),  # TensorRT-RTX has no data-centre GPUs
        ("sm120", Gpu("RTX 5090", (12, 0)), True),
        ("unknown", H100, False),
    ],
)
def test_engines_run_on_their_architecture(architecture: str, gpu: Gpu, fits: bool) -> None:
    assert runs_on(architecture, gpu.capability) is fits


def engine(graph: str = "step", **changes: str) -> Engine:
    target = {"architecture": "sm80+", "version": VERSION, "platform": platform_name(), "source": "a" * 64}
    return Engine(
        graph=graph,  # type: ignore[arg-type]
        runtime="tensorrt-rtx",
        file=f"tensorrt-rtx/key/{graph}.engine",
        opset=22,
        inputs={},
        outputs={},
        parity={},
        status="built",
        target=Target(**(target | changes), shapes={"latents": ((1, 4), (4, 4), (8, 4))}),
    )


def test_an_engine_of_this_machine_is_not_refused() -> None:
    assert mismatch(engine(), VERSION, RTX4090, "a" * 64) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "b" * 64}, "step.engine: it was built from another ONNX graph; build it again"),
        ({"platform": "win32-amd64"}, f"it is for win32-amd64, this is {platform_name()}; build it here"),
        ({"version": "1.2.0.54"}, "it was built by tensorrt-rtx 1.2.0.54, installed is 1.7.1.116; build it again"),
        ({"architecture": "sm120"}, "for GPUs of architecture sm120, this one (RTX 4090) is sm89; build it on this"),
    ],
)
def test_a_mismatch_names_both_sides_and_the_way_out(changes: dict[str, str], message: str) -> None:
    reason = mismatch(engine(**changes), VERSION, RTX4090, "a" * 64)
    assert reason is not None and message in reason


@pytest.mark.parametrize("shape", [(9, 4, 16, 16), (0, 4, 16, 16), (1, 4, 16, 24), (4, 16, 16)])
def test_a_shape_outside_of_the_profile_is_named(shape: tuple[int, ...]) -> None:
    least, greatest = (1, 4, 16, 16), (8, 4, 16, 16)
    check_shape("step.engine: latents", (8, 4, 16, 16), least, greatest)
    with pytest.raises(
        ValueError, match=r"step\.engine: latents has shape .* takes \(1, 4, 16, 16\) to .*; build it with"
    ):
        check_shape("step.engine: latents", shape, least, greatest)


def test_a_package_that_is_missing_or_broken_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineRefused, match=r"tensorrt is not installed; run: pip install 'leapfrog\[tensorrt\]'"):
        package("tensorrt")
    (tmp_path / "tensorrt_rtx.py").write_text("raise OSError('libtensorrt_rtx.so.1: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    with pytest.raises(EngineRefused, match=r"tensorrt-rtx does not load \(libtensorrt_rtx"):
        package("tensorrt-rtx")


@pytest.fixture
def with_engines(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle whose engine files are there and of the right graphs; nothing here loads them."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    manifest = Bundle.open(root).manifest
    engines = [engine(e.graph, source=manifest.files[e.file]) for e in manifest.engines]
    for built in engines:
        (root / built.file).parent.mkdir(parents=True, exist_ok=True)
        (root / built.file).write_bytes(b"engine")
    return write_manifest(root, manifest.model_copy(update={"engines": (*manifest.engines, *engines)}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an RTX 4090 and TensorRT-RTX, as far as the choice of engines asks."""
    monkeypatch.setattr(module, "installed", lambda: ["tensorrt-rtx"])
    monkeypatch.setattr(module, "package", lambda flavour: types.SimpleNamespace(__version__=VERSION))
    monkeypatch.setattr(module, "find_gpu", lambda index: RTX4090)
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_engines_that_fit_are_found_for_every_graph(with_engines: Bundle) -> None:
    flavour, found = fitting(with_engines, "float32")
    assert flavour == "tensorrt-rtx"
    assert set(found) == {"text_encoder", "step", "decoder"}
    assert all(with_engines.file(e.file).is_file() for e in found.values())


def test_another_gpu_is_refused_with_every_reason(with_engines: Bundle, machine: pytest.MonkeyPatch) -> None:
    machine.setattr(module, "find_gpu", lambda index: H100)
    with pytest.raises(EngineRefused, match=r"for GPUs of architecture sm80\+, this one \(H100\) is sm90"):
        fitting(with_engines, "float32")


@pytest.mark.usefixtures("machine")
def test_a_precision_that_was_not_built_is_refused(with_engines: Bundle) -> None:
    with pytest.raises(EngineRefused, match="there is no tensorrt-rtx engine of step in float16"):
        fitting(with_engines, "float16")


def test_what_is_missing_is_said_in_order(
    with_engines: Bundle, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineRefused, match=r"has no TensorRT engine; run: python -m distill\.export .* --to tensorrt"):
        fitting(Bundle.open(tiny_bundle), "float32")
    monkeypatch.setattr(module, "installed", list)
    with pytest.raises(EngineRefused, match=r"TensorRT is not installed; run: pip install"):
        fitting(with_engines, "float32")
    monkeypatch.setattr(module, "installed", lambda: ["tensorrt-rtx"])

    def no_gpu(index: int) -> Gpu:
        raise CudaUnavailable("libcuda.so.1 is not found: no NVIDIA driver is installed")

    monkeypatch.setattr(module, "find_gpu", no_gpu)
    with pytest.raises(EngineRefused, match="TensorRT needs an NVIDIA GPU: libcuda"):
        fitting(with_engines, "float32")
