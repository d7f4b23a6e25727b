"""ONNX Runtime on the CPU, in float32: its CPU provider has no bfloat16 arithmetic.

On x86 with AVX-512 (onnxruntime 1.32) every batch size is exact to the last bit; see service.runtimes.graphs.

What batching buys (UNet of 22 M parameters on 16x16 latents, 2 cores, milliseconds per row at 1, 2, 4, 8, 16 rows):
step 22.0, 18.6, 16.7, 16.3, 16.8; text encoder 1.6, 1.3, 1.3, 1.3, 1.2; decoder 10.5, 10.5, 10.7, 11.0, 11.1.
The gain never turns into a loss, so sizes are not chosen by a timing at load, which a busy machine would spoil.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Conditioning
from service.runtimes.graphs import OUTPUTS, GraphRuntime


class OnnxRuntime(GraphRuntime):
    """Every graph as a session of ONNX Runtime."""

    name = "onnx"

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int) -> None:
        super().__init__(bundle, threads=threads, max_batch=max_batch, precision="float32")

    @staticmethod
    def version() -> str:
        return str(ort.__version__)

    def _load(self, bundle: Bundle, graph: str) -> OnnxGraph:
        return OnnxGraph(bundle, graph, self.threads)


class OnnxGraph:
    """service.runtimes.graphs.Graph as a session; one session takes any number of rows."""

    def __init__(self, bundle: Bundle, graph: str, threads: int) -> None:
        path = bundle.file(bundle.engine(graph).file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the cores from the HTTP and encoding threads between two steps.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            first = str(error).splitlines()[0]
            raise BundleError(f"{path} does not load in onnxruntime: {first}; export the bundle again") from None
        self.inputs = frozenset(entry.name for entry in self._session.get_inputs())
        self._outputs = OUTPUTS[graph]

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        outputs: list[NDArray[np.generic]] = self._session.run(self._outputs, feed)
        return outputs
