"""Runtimes: what computes a bundle's graphs. Nothing else in the service knows which one runs."""

import importlib.util
import logging
import time
from dataclasses import replace
from typing import get_args

import numpy as np

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

TURNS = 3
"""Pictures that each candidate for "fastest" draws; the first compiles and warms up, the best counts."""

LARGEST_TWICE = 512 << 20
"""Bytes of weights up to which they may be in memory twice, for all cores together and for each alone."""

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
    "open_lanes",
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
    where it is installed. "fastest" is ONNX Runtime or OpenVINO, whichever draws faster here and now, so that another
    start may make other pictures. replica: the how manieth of this bundle, which goes to the GPU of that
    number where the runtime computes on one. Raises RuntimeUnavailable for a choice that this machine cannot serve,
    BundleError for a bundle without the graphs.
    """
    if runtime == "fastest":
        return _fastest(bundle, precision, threads, max_batch, replica)
    name, fixed = choose(runtime, precision)
    if runtime == "auto" and not any(e.runtime == "onnx" for e in bundle.manifest.engines) and _torch_is_installed():
        taken = _open(bundle, "torch", choose("torch", precision)[1], threads, max_batch, replica)
        taken.capabilities = replace(taken.capabilities, fallback="the bundle was not exported to onnx")
        return taken
    if name == "tensorrt":
        from service.runtimes.tensorrt import TensorRtRuntime

        try:
            return TensorRtRuntime(bundle, threads=threads, max_batch=max_batch, precision=fixed, replica=replica)
        except EngineRefused as error:
            reason = str(error)
        name, fixed = _instead_of_tensorrt(precision)
        logger.warning("%s: %s in %s instead of tensorrt: %s", bundle.manifest.name, name, fixed, reason)
        taken = _open(bundle, name, fixed, threads, max_batch, replica)
        taken.capabilities = replace(taken.capabilities, fallback=f"tensorrt was asked for: {reason}")
        return taken
    return _open(bundle, name, fixed, threads, max_batch, replica)


def open_lanes(bundle: Bundle, runtime: Runtime, count: int, max_batch: int) -> list[Runtime]:
    """``count`` runtimes that share the threads of one among them and may compute at the same time.

    None for a single one, where the runtime's calls cannot overlap, and for weights that are too large to be in memory
    once more.
    """
    if count == 1 or runtime.lane() is None:
        return []
    if sum(path.stat().st_size for path in bundle.path.rglob("*.safetensors")) > LARGEST_TWICE:
        return []
    able = runtime.capabilities
    narrow = _open(bundle, able.runtime, able.precision, max(1, able.threads // count), max_batch, replica=0)
    return [lane for lane in (narrow.lane() for _ in range(count)) if lane is not None]


def _fastest(bundle: Bundle, precision: Precision, threads: int, max_batch: int, replica: int) -> Runtime:
    """ONNX Runtime or OpenVINO, each in ``precision``, by the time that one picture or clip takes in turns."""
    found: list[GraphRuntime] = []
    reasons = []
    for candidate in ("onnx", "openvino"):
        try:
            name, fixed = choose(candidate, precision)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
        else:
            found.append(_open(bundle, name, fixed, threads, max_batch, replica))
    if not found:
        raise RuntimeUnavailable("; ".join(dict.fromkeys(reasons)))
    times = [min(turns) for turns in zip(*([_time_picture(one) for one in found] for _ in range(TURNS)), strict=True)]
    able = [one.capabilities for one in found]
    told = ", ".join(f"{a.runtime} in {a.precision} {ms:.1f} ms" for a, ms in zip(able, times, strict=True))
    taken = found[times.index(min(times))]
    taken.capabilities = replace(taken.capabilities, measured="; ".join([f"one picture: {told}", *reasons]))
    logger.info("%s: %s, by %s", bundle.manifest.name, taken.name, taken.capabilities.measured)
    return taken


def _time_picture(runtime: GraphRuntime) -> float:
    """Milliseconds of one picture or clip in the usual number of steps."""
    manifest = runtime.manifest
    labels: Conditioning = {"labels": np.zeros(1, np.int64)}
    start = time.perf_counter()
    generate(runtime, manifest, labels if manifest.max_tokens is None else [""], seeds=[0])
    return (time.perf_counter() - start) * 1e3


def _open(
    bundle: Bundle, name: RuntimeName, precision: FixedPrecision, threads: int, max_batch: int, replica: int
) -> GraphRuntime:
    if name == "onnx":
        return OnnxRuntime(bundle, threads=threads, max_batch=max_batch, precision=precision, replica=replica)
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
    "fastest" is for open_runtime, which has a bundle to measure.
    """
    assert runtime != "fastest", "open_runtime decides by measuring"
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
