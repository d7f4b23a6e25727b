"""Runtimes: what computes a bundle's graphs. Nothing else in the service knows which one runs."""

import importlib.util
import logging
from dataclasses import replace
from typing import get_args

from distill.bundle import Bundle
from distill.engines.tensorrt import EngineRefused
from service.runtimes.base import (
    Capabilities,
    Conditioning,
    FixedPrecision,
    Lora,
    LoraRefused,
    Precision,
    Runtime,
    RuntimeChoice,
    RuntimeName,
    RuntimeUnavailable,
    Tokens,
    generate,
)
from service.runtimes.graphs import GraphRuntime
from service.runtimes.onnx import OnnxRuntime, has_gpu_provider

logger = logging.getLogger(__name__)

__all__ = [
    "Capabilities",
    "Conditioning",
    "Lora",
    "LoraRefused",
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
    replica: int = 0,
) -> Runtime:
    """A bundle on the runtime that ``choose`` names, warmed up.

    TensorRT is for engines of this very machine: where the bundle has none, or there is no GPU, another runtime is
    taken and its capabilities tell why; so it is with "auto" and a bundle that was not exported, which torch takes
    where it is installed. replica: the how manieth of this bundle, which with torch goes to the GPU of that number.
    Raises RuntimeUnavailable for a choice that this machine cannot serve, BundleError for a bundle without the graphs.
    """
    name, fixed = choose(runtime, precision)
    if runtime == "auto" and not any(e.runtime == "onnx" for e in bundle.manifest.engines) and _torch_is_installed():
        taken = _open(bundle, "torch", choose("torch", precision)[1], threads, max_batch, replica)
        taken.capabilities = replace(taken.capabilities, fallback="the bundle was not exported to onnx")
        return taken
    if name == "tensorrt":
        from service.runtimes.tensorrt import TensorRtRuntime

        try:
            return TensorRtRuntime(bundle, threads=threads, max_batch=max_batch, precision=fixed)
        except EngineRefused as error:
            reason = str(error)
        name, fixed = _instead_of_tensorrt(precision)
        logger.warning("%s: %s in %s instead of tensorrt: %s", bundle.manifest.name, name, fixed, reason)
        taken = _open(bundle, name, fixed, threads, max_batch, replica)
        taken.capabilities = replace(taken.capabilities, fallback=f"tensorrt was asked for: {reason}")
        return taken
    return _open(bundle, name, fixed, threads, max_batch, replica)


def _open(
    bundle: Bundle, name: RuntimeName, precision: FixedPrecision, threads: int, max_batch: int, replica: int
) -> GraphRuntime:
    if name == "onnx":
        return OnnxRuntime(bundle, threads=threads, max_batch=max_batch, precision=precision)
    if name == "torch":
        from service.runtimes.torch import TorchRuntime

        return TorchRuntime(bundle, threads=threads, max_batch=max_batch, precision=precision, replica=replica)
    from service.runtimes.openvino import OpenVinoRuntime

    return OpenVinoRuntime(bundle, threads=threads, max_batch=max_batch, precision=precision)


def _instead_of_tensorrt(precision: Precision) -> tuple[RuntimeName, FixedPrecision]:
    """What "auto" is in this precision, or in float32 where only TensorRT has it."""
    try:
        return choose("auto", precision)
    except RuntimeUnavailable:
        return choose("auto", "float32")


def choose(runtime: str, precision: str) -> tuple[RuntimeName, FixedPrecision]:
    """What "auto" means on this machine; no timing enters, so that the same machine always makes the same pictures.

    precision "auto" is bfloat16 where OpenVINO may be used, is installed and the processor multiplies in bfloat16, else
    float32. runtime "auto" is OpenVINO for bfloat16, which nothing else has, and ONNX Runtime for all others: in
    float32 the two are about as fast; see benchmarks/results/inference.json. float16 is for GPUs, int8 for bundles that
    have it. TensorRT is taken only by name: which of its engines fit is for each bundle to say. torch has no int8.
    """
    for what, value, known in (("runtime", runtime, RuntimeChoice), ("precision", precision, Precision)):
        if value not in get_args(known):
            raise RuntimeUnavailable(f"{what} is {value!r}; use one of {', '.join(get_args(known))}")
    if runtime == "tensorrt":
        return "tensorrt", _fixed("float32" if precision == "auto" else precision)
    if runtime == "torch":
        return "torch", _torch_precision(precision)
    if runtime == "onnx" and precision == "bfloat16":
        raise RuntimeUnavailable(
            "precision is bfloat16 and ONNX Runtime has none on the CPU; use float32, or the runtime openvino"
        )
    if precision == "float16" and (runtime == "openvino" or not has_gpu_provider()):
        raise RuntimeUnavailable(
            "precision is float16, which is for GPUs; use float32, or onnxruntime-gpu or the runtime tensorrt"
        )
    if runtime == "onnx" or (runtime == "auto" and precision in ("float32", "float16", "int8")):
        return "onnx", _fixed("float32" if precision == "auto" else precision)
    installed = _openvino_is_installed()
    if precision == "auto":
        precision = "bfloat16" if installed and _has_bfloat16() else "float32"
        if runtime == "auto" and precision == "float32":
            return "onnx", "float32"
    if not installed:
        asked = "runtime is openvino" if runtime == "openvino" else "precision is bfloat16"
        raise RuntimeUnavailable(f"{asked} and OpenVINO is not installed; run: pip install 'leapfrog[openvino]'")
    return "openvino", _fixed(precision)


def _fixed(precision: str) -> FixedPrecision:
    return next(known for known in get_args(FixedPrecision) if known == precision)


def _torch_precision(precision: str) -> FixedPrecision:
    """float32 is "auto", because it alone is exact everywhere. Raises RuntimeUnavailable."""
    if not _torch_is_installed():
        raise RuntimeUnavailable("runtime is torch and torch is not installed; run: pip install 'leapfrog[train]'")
    if precision == "int8":
        raise RuntimeUnavailable("precision is int8, which torch has not here; use float32, or the runtime onnx")
    if precision == "float16":
        from service.runtimes.torch import has_gpu

        if not has_gpu():
            raise RuntimeUnavailable("precision is float16, which is for GPUs; use float32 or bfloat16")
    return _fixed("float32" if precision == "auto" else precision)


def _torch_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers", "transformers"))


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
