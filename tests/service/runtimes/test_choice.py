"""Which runtime and precision a request for them gets, and what is said when it cannot be had."""

from __future__ import annotations

import sys

import pytest

from service.runtimes import RuntimeUnavailable, choose
from service.runtimes import openvino as module


@pytest.fixture(params=[True, False], ids=["with-bfloat16", "without-bfloat16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "has_bfloat16", lambda: request.param)
    return bool(request.param)


def test_the_default_is_onnx_runtime_in_float32(processor: bool) -> None:
    assert choose("auto", "float32") == ("onnx", "float32")


def test_auto_is_bfloat16_only_where_the_processor_has_it(processor: bool) -> None:
    assert choose("auto", "auto") == (("openvino", "bfloat16") if processor else ("onnx", "float32"))
    assert choose("openvino", "auto") == ("openvino", "bfloat16" if processor else "float32")
    assert choose("onnx", "auto") == ("onnx", "float32")


def test_what_is_named_is_taken(processor: bool) -> None:
    assert choose("openvino", "float32") == ("openvino", "float32")
    assert choose("auto", "bfloat16") == choose("openvino", "bfloat16") == ("openvino", "bfloat16")


def test_tensorrt_is_taken_by_name_only(processor: bool) -> None:
    assert choose("tensorrt", "auto") == choose("tensorrt", "float32") == ("tensorrt", "float32")
    assert choose("tensorrt", "float16") == ("tensorrt", "float16")
    assert choose("auto", "int8") == choose("onnx", "int8") == ("onnx", "int8")
    assert choose("openvino", "int8") == ("openvino", "int8")


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "service.runtimes.openvino", raising=False)


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize(
    ("runtime", "precision", "asked"),
    [
        ("openvino", "float32", "runtime is openvino"),
        ("openvino", "auto", "runtime is openvino"),
        ("auto", "bfloat16", "precision is bfloat16"),
    ],
)
def test_a_missing_package_is_an_error_with_the_install_line(runtime: str, precision: str, asked: str) -> None:
    with pytest.raises(RuntimeUnavailable) as refused:
        choose(runtime, precision)
    assert str(refused.value) == f"{asked} and OpenVINO is not installed; run: pip install 'leapfrog[openvino]'"


@pytest.mark.usefixtures("without_openvino")
def test_without_the_package_auto_is_onnx_runtime() -> None:
    assert choose("auto", "auto") == choose("auto", "float32") == ("onnx", "float32")


@pytest.mark.parametrize(
    ("runtime", "precision", "message"),
    [
        ("coreml", "float32", r"runtime is 'coreml'; use one of auto, onnx, openvino, tensorrt, torch, fastest"),
        ("onnx", "float64", r"precision is 'float64'; use one of auto, float32, bfloat16, float16, int8"),
        ("onnx", "float16", r"precision is float16, which is for GPUs; use float32"),
        ("openvino", "float16", r"precision is float16, which is for GPUs; use float32"),
        ("onnx", "bfloat16", r"ONNX Runtime has none on the CPU; use float32, or the runtime openvino"),
    ],
)
def test_options_that_do_not_exist_are_refused(runtime: str, precision: str, message: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=message):
        choose(runtime, precision)
