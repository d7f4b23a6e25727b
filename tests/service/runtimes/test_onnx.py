"""ONNX Runtime's providers: the best that is installed, with options that make a seed give one picture."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from service.runtimes import OnnxRuntime, RuntimeUnavailable, choose
from service.runtimes import onnx as module
from service.runtimes.onnx import GPU_PROVIDERS, has_gpu_provider, providers

CPU = "CPUExecutionProvider"


def test_a_gpu_comes_first_and_the_processor_last(tmp_path: Path) -> None:
    available = ["AzureExecutionProvider", "CUDAExecutionProvider", CPU, "TensorrtExecutionProvider"]
    tensorrt, cuda, last = providers(available, tmp_path)
    assert (tensorrt[0], cuda[0], last) == (*GPU_PROVIDERS, CPU)
    assert cuda[1] == {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": False}
    assert tensorrt[1]["trt_engine_cache_enable"] and tensorrt[1]["trt_engine_cache_path"] == str(tmp_path)  # type: ignore[index]


def test_only_what_is_installed_is_offered(tmp_path: Path) -> None:
    """ONNX Runtime warns about a provider that it does not have, and warnings are errors."""
    assert providers([CPU], tmp_path) == [CPU]
    assert [entry[0] for entry in providers(["CUDAExecutionProvider", CPU], tmp_path)[:-1]] == ["CUDAExecutionProvider"]


def test_the_device_is_that_of_the_provider_that_loaded(runtime: OnnxRuntime) -> None:
    loaded = runtime._step.provider  # type: ignore[attr-defined]
    assert loaded in ort.get_available_providers()
    assert runtime.capabilities.device == ("cpu" if loaded == CPU else "cuda")


def test_float16_is_for_a_gpu_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: [CPU])
    assert not has_gpu_provider()
    with pytest.raises(RuntimeUnavailable, match="precision is float16, which is for GPUs"):
        choose("onnx", "float16")
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    assert choose("onnx", "float16") == choose("auto", "float16") == ("onnx", "float16")
