"""ONNX Runtime's providers: the best that is installed, with options that make a seed give one picture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from distill.bundle import Bundle
from service import runtimes
from service.runtimes import OnnxRuntime, RuntimeUnavailable, choose, generate, open_lanes, open_runtime
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


def test_lanes_share_weights_and_compute_at_the_same_time_what_one_alone_computes(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    wide = open_runtime(bundle, threads=2, max_batch=2)
    lanes = open_lanes(bundle, wide, 2, max_batch=2)
    assert [lane.capabilities.threads for lane in lanes] == [1, 1]
    assert lanes[0] is not lanes[1]
    sessions = [lane._step._session for lane in lanes]  # type: ignore[attr-defined]
    assert sessions[0] is sessions[1]
    prompts, seeds = ["a red cube", "a blue sphere"], range(2)
    alone = generate(wide, bundle.manifest, prompts, seeds)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            made = pool.map(lambda lane: generate(lane, bundle.manifest, prompts, seeds), lanes)
            for pictures in made:
                np.testing.assert_array_equal(pictures, alone)


def test_one_lane_is_none_and_large_weights_are_not_loaded_twice(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    runtime = open_runtime(bundle, threads=1, max_batch=1)
    assert open_lanes(bundle, runtime, 1, max_batch=1) == []
    monkeypatch.setattr(runtimes, "LARGEST_TWICE", 10)
    assert open_lanes(bundle, runtime, 2, max_batch=1) == []
