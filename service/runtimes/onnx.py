"""ONNX Runtime: its CPU provider in float32 and int8, or a GPU's where the installed package has one.

The CPU provider has no bfloat16 arithmetic. On x86 with AVX-512 (onnxruntime 1.32) every batch size is exact to the
last bit; see service.runtimes.graphs.

What batching buys (UNet of 22 M parameters on 16x16 latents, 2 cores, milliseconds per row at 1, 2, 4, 8, 16 rows):
step 22.0, 18.6, 16.7, 16.3, 16.8; text encoder 1.6, 1.3, 1.3, 1.3, 1.2; decoder 10.5, 10.5, 10.7, 11.0, 11.1.
The gain never turns into a loss, so sizes are not chosen by a timing at load, which a busy machine would spoil.

GPU. Whoever installs ``onnxruntime-gpu`` instead of ``onnxruntime`` gets its TensorRT and CUDA providers, in this
order, as far as their libraries load: the middle way between the CPU and engines of our own, at any shape and without a
build.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from distill.bundle import Bundle, BundleError
from distill.engines.cuda import gpu_of
from service.runtimes.base import Conditioning, FixedPrecision, Runtime
from service.runtimes.graphs import GraphRuntime, graph_engine

Provider = str | tuple[str, dict[str, Any]]
SPIN_US = "200"
GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


def providers(available: Sequence[str], cache: Path, gpu: int = 0) -> list[Provider]:
    """The providers to offer a session, best first, with options that make a seed give one picture.

    gpu: its number, for those that compute on one.

    CUDA: kernels are picked by rule and not by a timing at load, and float32 is float32 instead of TF32. TensorRT does
    time, so what it built is kept in ``cache``.
    """
    options: dict[str, dict[str, Any]] = {
        "TensorrtExecutionProvider": {
            "device_id": gpu,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(cache),
        },
        "CUDAExecutionProvider": {"device_id": gpu, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": False},
    }
    found: list[Provider] = [(name, options[name]) for name in GPU_PROVIDERS if name in available]
    return [*found, "CPUExecutionProvider"]


def has_gpu_provider() -> bool:
    return any(name in ort.get_available_providers() for name in GPU_PROVIDERS)


class OnnxRuntime(GraphRuntime):
    """Every graph as a session of ONNX Runtime."""

    name = "onnx"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        max_batch: int,
        precision: FixedPrecision = "float32",
        replica: int = 0,
    ) -> None:
        """On the GPU number ``replica``, modulo how many there are, where a provider has GPUs."""
        self._gpu = gpu_of(replica) if has_gpu_provider() else 0
        super().__init__(bundle, threads=threads, max_batch=max_batch, precision=precision)

    def version(self) -> str:
        return str(ort.__version__)

    def lane(self) -> Runtime | None:
        """On a processor: sessions may be run by several threads at once, and one thread of a graph is the caller's."""
        return copy.copy(self) if self.device == "cpu" else None

    def _load(self, bundle: Bundle, graph: str) -> OnnxGraph:
        loaded = OnnxGraph(bundle, graph, self.threads, self.precision, self._gpu)
        if graph == "step":
            self.device = "cpu" if loaded.provider == "CPUExecutionProvider" else f"cuda:{self._gpu}"
        return loaded


class OnnxGraph:
    """service.runtimes.graphs.Graph as a session; one session takes any number of rows."""

    def __init__(
        self, bundle: Bundle, graph: str, threads: int, precision: FixedPrecision = "float32", gpu: int = 0
    ) -> None:
        engine = graph_engine(bundle, graph, precision)
        path, self.outputs = bundle.file(engine.file), tuple(engine.outputs)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A thread that sleeps between two nodes wakes up late: a picture takes a quarter longer. One that waits
        # actively beyond them would take its core from the threads of HTTP and encoding.
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            offered = providers(ort.get_available_providers(), _engine_cache(), gpu)
            self._session = ort.InferenceSession(str(path), options, providers=offered)
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            first = str(error).splitlines()[0]
            raise BundleError(f"{path} does not load in onnxruntime: {first}; export the bundle again") from None
        self.provider = str(self._session.get_providers()[0])
        self.inputs = frozenset(entry.name for entry in self._session.get_inputs())

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        outputs: list[NDArray[np.generic]] = self._session.run(self.outputs, feed)
        return outputs


def _engine_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leapfrog" / "onnxruntime"
