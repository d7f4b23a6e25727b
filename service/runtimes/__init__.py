"""Runtimes: what computes a bundle's graphs. Nothing else in the service knows which one runs."""

from typing import get_args

from distill.bundle import Bundle
from service.runtimes.base import (
    Capabilities,
    Conditioning,
    FixedPrecision,
    Precision,
    Runtime,
    RuntimeChoice,
    RuntimeName,
    RuntimeUnavailable,
    Tokens,
    generate,
)
from service.runtimes.onnx import OnnxRuntime

__all__ = [
    "Capabilities",
    "Conditioning",
    "OnnxRuntime",
    "Precision",
    "Runtime",
    "RuntimeChoice",
    "RuntimeUnavailable",
    "Tokens",
    "choose",
    "generate",
    "open_runtime",
]


def open_runtime(
    bundle: Bundle,
    *,
    threads: int,
    max_batch: int,
    runtime: RuntimeChoice = "auto",
    precision: Precision = "float32",
) -> Runtime:
    """A bundle on the runtime that ``choose`` names, warmed up.

    Raises RuntimeUnavailable for a choice that this machine cannot serve, BundleError for a bundle without the graphs.
    """
    name, fixed = choose(runtime, precision)
    if name == "onnx":
        return OnnxRuntime(bundle, threads=threads, max_batch=max_batch)
    from service.runtimes.openvino import OpenVinoRuntime

    return OpenVinoRuntime(bundle, threads=threads, max_batch=max_batch, precision=fixed)


def choose(runtime: str, precision: str) -> tuple[RuntimeName, FixedPrecision]:
    """What "auto" means on this machine; no timing enters, so that the same machine always makes the same pictures.

    precision "auto" is bfloat16 where OpenVINO may be used, is installed and the processor multiplies in bfloat16, else
    float32. runtime "auto" is OpenVINO for bfloat16, which nothing else has, and ONNX Runtime for float32, where the
    two are about as fast; see benchmarks/results/inference.json.
    """
    for what, value, known in (("runtime", runtime, RuntimeChoice), ("precision", precision, Precision)):
        if value not in get_args(known):
            raise RuntimeUnavailable(f"{what} is {value!r}; use one of {', '.join(get_args(known))}")
    if runtime == "onnx" and precision == "bfloat16":
        raise RuntimeUnavailable(
            "precision is bfloat16 and ONNX Runtime has none on the CPU; use float32, or the runtime openvino"
        )
    if runtime == "onnx" or (runtime == "auto" and precision == "float32"):
        return "onnx", "float32"
    installed = _openvino_is_installed()
    if precision == "auto":
        precision = "bfloat16" if installed and _has_bfloat16() else "float32"
        if runtime == "auto" and precision == "float32":
            return "onnx", "float32"
    if not installed:
        asked = "runtime is openvino" if runtime == "openvino" else "precision is bfloat16"
        raise RuntimeUnavailable(f"{asked} and OpenVINO is not installed; run: pip install 'leapfrog[openvino]'")
    return "openvino", "bfloat16" if precision == "bfloat16" else "float32"


def _openvino_is_installed() -> bool:
    try:
        import openvino  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        return False
    return True


def _has_bfloat16() -> bool:
    from service.runtimes.openvino import has_bfloat16

    return has_bfloat16()
