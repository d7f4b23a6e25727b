"""TensorRT engines of a bundle: which of them fits this machine, and how one runs.

One adapter for two packages with one interface: ``tensorrt`` for data-centre GPUs and ``tensorrt-rtx`` for RTX. An
engine belongs to a package version, a GPU architecture, a platform and one ONNX graph; one that does not fit is refused
with the reason, because loading it anyway ends in an obscure error at best and in wrong pictures at worst.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, Engine, sha256
from distill.engines.cuda import Buffer, CudaError, CudaUnavailable, Gpu, Stream, driver, find_gpu

logger = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = "pip install 'leapfrog[tensorrt]' (data-centre GPUs) or 'leapfrog[rtx]' (RTX GPUs)"

RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""tensorrt_rtx.ComputeCapability of 1.7; not 9.0 and 10.0, the data-centre Hopper and Blackwell."""
PORTABLE = "sm80+"
"""TensorRT-RTX's default target: every capability of RTX_CAPABILITIES from 8.0."""

Arrays = Mapping[str, NDArray[Any]]


class EngineRefused(Exception):
    """No engine of this bundle can run on this machine; the message says why."""


def platform_name() -> str:
    return f"{sys.platform}-{platform.machine().lower()}"


def package(flavour: Flavour) -> Any:
    """The flavour's Python package. Raises EngineRefused with the install line."""
    try:
        return importlib.import_module(_MODULES[flavour])
    except (ImportError, OSError, RuntimeError) as error:  # a half-installed package fails while loading libraries
        absent = isinstance(error, ModuleNotFoundError) and error.name == _MODULES[flavour]
        why = "is not installed" if absent else f"does not load ({error})"
        raise EngineRefused(f"{flavour} {why}; run: {INSTALL}") from None


def installed() -> list[Flavour]:
    """The flavours that this Python can import."""
    found: list[Flavour] = []
    for flavour in FLAVOURS:
        try:
            package(flavour)
        except EngineRefused:
            continue
        found.append(flavour)
    return found


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether an engine for ``architecture`` (sm90, sm80+) runs on a GPU of this compute capability."""
    match = re.fullmatch(r"sm(\d+)(\d)(\+?)", architecture)
    if not match:
        return False
    built = (int(match[1]), int(match[2]))
    return capability >= built and capability in RTX_CAPABILITIES if match[3] else capability == built


def mismatch(engine: Engine, version: str, gpu: Gpu, graph_sha256: str) -> str | None:
    """Why an engine does not fit, or None. version: of the installed package; graph_sha256: of the bundle's graph."""
    target = engine.target
    assert target is not None, f"{engine.file} has no target"
    checks = (
        (target.source == graph_sha256, "it was built from another ONNX graph", "build it again"),
        (
            target.platform == platform_name(),
            f"it is for {target.platform}, this is {platform_name()}",
            "build it here",
        ),
        (
            target.version == version,
            f"it was built by {engine.runtime} {target.version}, installed is {version}",
            "build it again",
        ),
        (
            runs_on(target.architecture, gpu.capability),
            f"it is for GPUs of architecture {target.architecture}, this one ({gpu.name}) is {gpu.architecture}",
            "build it on this machine",
        ),
    )
    for fits, why, way_out in checks:
        if not fits:
            return f"{engine.file}: {why}; {way_out}"
    return None


def fitting(bundle: Bundle, precision: str, gpu: int = 0) -> tuple[Flavour, dict[str, Engine]]:
    """The flavour and the engines, by graph, that run on this machine's GPU of that number.

    Graphs that have none in ``precision`` may be float32. Raises EngineRefused with all that stands in the way.
    """
    graphs = [engine.graph for engine in bundle.manifest.engines if engine.runtime == "onnx"]
    if not any(engine.runtime in FLAVOURS for engine in bundle.manifest.engines):
        raise EngineRefused(
            f"{bundle.manifest.name} has no TensorRT engine; run: python -m distill.export {bundle.path} --to tensorrt"
        )
    flavours = installed()
    if not flavours:
        raise EngineRefused(f"TensorRT is not installed; run: {INSTALL}")
    try:
        found = find_gpu(gpu)
    except CudaUnavailable as error:
        raise EngineRefused(f"TensorRT needs an NVIDIA GPU: {error}") from None
    reasons = []
    for flavour in flavours:
        version = str(package(flavour).__version__)
        chosen: dict[str, Engine] = {}
        for graph in dict.fromkeys(graphs):
            candidates = [*bundle.engines(graph, flavour, precision)]
            if precision != "float32" and graph != "step":
                candidates += bundle.engines(graph, flavour)
            for engine in candidates:
                source = bundle.manifest.files[bundle.engine(graph, "onnx", engine.precision).file]
                why = mismatch(engine, version, found, source)
                if why is None:
                    chosen[graph] = engine
                    break
                reasons.append(why)
            else:
                if not candidates:
                    reasons.append(f"there is no {flavour} engine of {graph} in {precision}")
        if len(chosen) == len(set(graphs)):
            return flavour, chosen
    raise EngineRefused("; ".join(dict.fromkeys(reasons)))


class Log:
    """TensorRT's messages as Python's: warnings and worse. Holds the last error for the exception to come."""

    def __init__(self, trt: Any) -> None:
        log = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(trt.ILogger.ERROR):
                    log.errors.append(message)
                    logger.error("%s", message)

        self.errors: list[str] = []
        self.logger = Logger()

    @property
    def reason(self) -> str:
        return self.errors[0].strip().splitlines()[0] if self.errors else "TensorRT gives no reason"


class TensorRtEngine:
    """One engine on one GPU, called with numpy arrays.

    A context, buffers and a CUDA graph are kept per shape of the inputs.

    Not for several threads at once. Under TensorRT-RTX kernels are compiled for this GPU at the first call of a shape;
    ``cache`` keeps them, so that the next process starts at once.
    """

    def __init__(self, path: Path, flavour: Flavour, cache: Path | None = None, gpu: int = 0) -> None:
        """gpu: its number. Raises EngineRefused when TensorRT or the GPU does not take the file."""
        self._trt, self._path = package(flavour), path
        self._log, self._stream = Log(self._trt), Stream(gpu)
        self._runtime = self._trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineRefused(f"{path} does not load: {self._log.reason}; build it again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        read = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        self.inputs, self.outputs = tuple(read), tuple(name for name in names if name not in read)
        self._kernels = RtxKernels(self._engine, self._trt, cache) if flavour == "tensorrt-rtx" else None
        self._plans: dict[tuple[tuple[int, ...], ...], _Plan] = {}

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; the arrays belong to the caller. Raises ValueError for a shape outside the profile."""
        driver(self._stream.gpu).enter()
        key = tuple(tuple(feed[name].shape) for name in self.inputs)
        if key not in self._plans:
            self._plans[key] = self._prepare(dict(zip(self.inputs, key, strict=True)))
        return self._plans[key].run(feed)

    def _prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> _Plan:
        for name, shape in shapes.items():
            least, _, greatest = (tuple(side) for side in self._engine.get_tensor_profile_shape(name, 0))
            check_shape(f"{self._path.name}: {name}", shape, least, greatest)
        context = self._kernels.context() if self._kernels else self._engine.create_execution_context()
        if context is None:
            raise CudaError(f"no memory for {self._path.name} at {dict(shapes)}: {self._log.reason}")
        plan = _Plan(context, self._engine, self._trt, self._stream, shapes, self.outputs, self._kernels is None)
        if self._kernels:
            self._kernels.save()
        return plan


def check_shape(what: str, shape: tuple[int, ...], least: tuple[int, ...], greatest: tuple[int, ...]) -> None:
    """Raise ValueError for a shape outside of a profile, before TensorRT does something unnamed with it."""
    if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True)):
        raise ValueError(
            f"{what} has shape {shape} and the engine takes {least} to {greatest}; build it with other --rows or sizes"
        )


class RtxKernels:
    """How TensorRT-RTX completes an engine at run time: when kernels are compiled, recorded and kept."""

    def __init__(self, engine: Any, trt: Any, cache: Path | None) -> None:
        self._engine, self._file = engine, cache
        self._config = engine.create_runtime_config()
        # Lazy specialisation swaps kernels while serving, and the same seed would give two pictures.
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self._config.create_runtime_cache()
        if cache is not None and cache.is_file():
            self._cache.deserialize(cache.read_bytes())  # one of another driver is ignored
        self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(bytes(self._cache.serialize()))
            temporary.replace(self._file)
        except OSError as error:
            logger.warning("compiled kernels are not kept: %s", error)
            temporary.unlink(missing_ok=True)


class _Plan:
    """One context at fixed shapes: buffers are allocated once, and what a call launches is one CUDA graph."""

    def __init__(
        self,
        context: Any,
        engine: Any,
        trt: Any,
        stream: Stream,
        shapes: Mapping[str, tuple[int, ...]],
        outputs: tuple[str, ...],
        record: bool,
    ) -> None:
        self._context, self._stream, self._outputs = context, stream, outputs
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        unknown = context.infer_shapes()
        assert not unknown, f"shapes of {unknown} do not follow from {dict(shapes)}"
        self._buffers = {}
        for name in (*shapes, *outputs):
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            self._buffers[name] = Buffer(tuple(context.get_tensor_shape(name)), dtype, stream.gpu)
            context.set_tensor_address(name, self._buffers[name].address)
        self._inputs = tuple(shapes)
        for name in shapes:  # whatever lies in fresh memory is no index of a table
            self._buffers[name].upload(self._buffers[name].host, stream)
        self._enqueue()  # the first call allocates and compiles, which cannot be recorded
        stream.synchronize()
        self._launch: Callable[[], None] = stream.record(self._enqueue) if record else self._enqueue

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        for name in self._inputs:
            self._buffers[name].upload(feed[name], self._stream)
        self._launch()
        for name in self._outputs:
            self._buffers[name].download(self._stream)
        self._stream.synchronize()
        return {name: self._buffers[name].host.copy() for name in self._outputs}

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle.value):
            raise CudaError("TensorRT did not start the engine; its message is above")


def kernel_cache(engine_file: Path) -> Path:
    """Where TensorRT-RTX's compiled kernels of an engine are kept: in the user's cache, by the engine's content."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "leapfrog" / "tensorrt-rtx" / f"{sha256(engine_file)[:16]}.kernels"
