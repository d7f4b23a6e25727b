"""ONNX Runtime's providers: the best that is installed, with options that make a seed give one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from distill.bundle import Bundle
from service.runtimes import OnnxRuntime, RuntimeUnavailable, choose, open_runtime
from service.runtimes import onnx as module
from service.runtimes.onnx import GPU_PROVIDERS, has_gpu_provider, providers

CPU = "CPUExecutionProvider"


def test_a_gpu_comes_first_and_the_processor_last(tmp_path: Path) -> None:
    available = ["AzureExecutionProvider", "CUDAExecutionProvider", CPU, "TensorrtExecutionProvider"]
    tensorrt, cuda, last = providers(available, tmp_path)
    assert (tensorrt[0], cuda[0], last) == (*GPU_PROVIDERS, CPU)
    assert cuda[1] == {"device_id": 0, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": False}
    assert tensorrt[1]["trt_engine_cache_enable"] and tensorrt[1]["trt_engine_cache_path"] == str(tmp_path)  # type: ignore[index]


def test_only_what_is_installed_is_offered(tmp_path: Path) -> None:
    """ONNX Runtime warns about a provider that it does not have, and warnings are errors."""
    assert providers([CPU], tmp_path) == [CPU]
    assert [entry[0] for entry in providers(["CUDAExecutionProvider", CPU], tmp_path)[:-1]] == ["CUDAExecutionProvider"]


def test_the_device_is_that_of_the_provider_that_loaded(runtime: OnnxRuntime) -> None:
    loaded = runtime._step.provider  # type: ignore[attr-defined]
    assert loaded in ort.get_available_providers()
    assert runtime.capabilities.device == ("cpu" if loaded == CPU else "cuda:0")


def test_each_replica_asks_for_the_gpu_of_its_number(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs, as far as the options that a session gets."""
    offered: list[list[Any]] = []
    session = ort.InferenceSession

    def open_session(path: str, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        offered.append(providers)
        return session(path, options, providers=[CPU])

    monkeypatch.setattr(module.ort, "get_available_providers", lambda: [*GPU_PROVIDERS, CPU])
    monkeypatch.setattr(module.ort, "InferenceSession", open_session)
    monkeypatch.setattr(module, "gpu_of", lambda replica: replica % 2)
    for replica, gpu in ((0, 0), (1, 1), (2, 0)):
        offered.clear()
        open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, runtime="onnx", replica=replica)
        assert {provider[1]["device_id"] for every in offered for provider in every[:-1]} == {gpu}
        assert all([name for name, _ in every[:-1]] == [*GPU_PROVIDERS] for every in offered)


def test_float16_is_for_a_gpu_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: [CPU])
    assert not has_gpu_provider()
    with pytest.raises(RuntimeUnavailable, match="precision is float16, which is for GPUs"):
        choose("onnx", "float16")
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    assert choose("onnx", "float16") == choose("auto", "float16") == ("onnx", "float16")
