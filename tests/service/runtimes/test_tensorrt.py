"""TensorRT as a runtime: what is taken instead of an engine that cannot run here, and that it is told."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from distill.bundle import Bundle, Engine, Target
from distill.engines import tensorrt as engines
from distill.engines.cuda import CudaUnavailable, Gpu
from service.runtimes import OnnxRuntime, generate, open_runtime
from service.runtimes import tensorrt as runtimes
from service.runtimes.tensorrt import greatest_rows


def no_gpu(index: int) -> Gpu:
    raise CudaUnavailable("libcuda.so.1 is not found: no NVIDIA driver is installed")


def test_a_bundle_without_engines_runs_elsewhere_and_tells_why(
    tiny_bundle: Path, runtime: OnnxRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(tiny_bundle)
    with caplog.at_level(logging.WARNING):
        taken = open_runtime(bundle, threads=1, max_batch=2, runtime="tensorrt")
    able = taken.capabilities
    assert (able.runtime, able.precision, able.device) == ("onnx", "float32", "cpu")
    assert able.fallback.startswith("tensorrt was asked for: tiny-sdxl has no TensorRT engine; run: python -m distill")
    assert "onnx in float32 instead of tensorrt: tiny-sdxl has no TensorRT engine" in caplog.text
    pictures = [generate(r, bundle.manifest, ["a red cube"], [3], steps=2) for r in (taken, runtime)]
    np.testing.assert_array_equal(*pictures)


def test_a_precision_that_only_tensorrt_has_becomes_float32(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, runtime="tensorrt", precision="float16")
    assert (taken.capabilities.runtime, taken.capabilities.precision) == ("onnx", "float32")
    assert taken.capabilities.fallback and caplog.records


def test_what_runs_as_asked_reports_no_fallback(runtime: OnnxRuntime) -> None:
    assert runtime.capabilities.fallback == ""


def test_a_machine_without_a_gpu_refuses_before_it_loads_an_engine(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    target = Target(architecture="sm80+", version="1", platform="linux-x86_64", source="", shapes={})
    built = bundle.engine("step").model_copy(update={"runtime": "tensorrt-rtx", "target": target})
    manifest = bundle.manifest.model_copy(update={"engines": (*bundle.manifest.engines, built)})
    monkeypatch.setattr(engines, "installed", lambda: ["tensorrt-rtx"])
    monkeypatch.setattr(engines, "find_gpu", no_gpu)
    with pytest.raises(engines.EngineRefused, match="TensorRT needs an NVIDIA GPU: libcuda"):
        engines.fitting(Bundle(bundle.path, manifest), "float32")


def test_a_replica_looks_for_engines_of_the_gpu_of_its_number(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fitting(bundle: Bundle, precision: str, gpu: int) -> None:
        asked.append(gpu)
        raise engines.EngineRefused("no engine fits")

    monkeypatch.setattr(runtimes, "gpu_of", lambda replica: replica % 2)
    monkeypatch.setattr(runtimes, "fitting", fitting)
    for replica in range(3):
        with pytest.raises(engines.EngineRefused):
            runtimes.TensorRtRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=1, replica=replica)
    assert asked == [0, 1, 0]


def test_batches_end_where_the_narrowest_profile_does() -> None:
    shapes = {"latents": ((1, 4), (4, 4), (8, 4)), "timestep": ((1,), (2,), (4,))}
    target = Target(architecture="sm90", version="10", platform="linux-x86_64", source="", shapes=shapes)
    engine = Engine(graph="step", file="step.engine", opset=22, inputs={}, outputs={}, parity={}, target=target)
    assert greatest_rows(engine) == 4
