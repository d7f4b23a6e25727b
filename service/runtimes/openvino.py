"""OpenVINO on the CPU, from the same ONNX graphs: float32, or bfloat16 where the processor multiplies in it.

Precision. OpenVINO computes float32 models in bfloat16 wherever it can unless told otherwise, so the precision is
always set, and what was compiled is asked what it became.

Shapes. One model is compiled per number of rows and size of picture, with every shape fixed, at the first call that
needs it: with a free batch a step took 1.3 times (float32) to 1.6 times (bfloat16) as long. Each costs half a second
and a copy of the weights for a UNet of 4 M parameters. Numbers of rows are those of service.runtimes.graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Conditioning, FixedPrecision, RuntimeUnavailable
from service.runtimes.graphs import OUTPUTS, GraphRuntime

_HINTS = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AMX or AVX512-BF16), so that it is faster than float32."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoRuntime(GraphRuntime):
    """Every graph compiled by OpenVINO's CPU plugin."""

    name = "openvino"

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int, precision: FixedPrecision = "float32") -> None:
        """See GraphRuntime. Raises RuntimeUnavailable for bfloat16 on a processor that has none."""
        if precision == "bfloat16" and not has_bfloat16():
            raise RuntimeUnavailable(
                "precision is bfloat16 and this processor has neither AMX nor AVX512-BF16; use float32"
            )
        self._core = ov.Core()
        super().__init__(bundle, threads=threads, max_batch=max_batch, precision=precision)

    @staticmethod
    def version() -> str:
        return str(ov.__version__).partition("-")[0]

    def _load(self, bundle: Bundle, graph: str) -> OpenVinoGraph:
        path = bundle.file(bundle.engine(graph).file)
        precision = self.precision if graph == "step" else "float32"
        return OpenVinoGraph(self._core, path, OUTPUTS[graph], self.threads, precision)


class OpenVinoGraph:
    """service.runtimes.graphs.Graph as one compiled model per shape of the inputs."""

    def __init__(
        self, core: ov.Core, path: Path, outputs: tuple[str, ...], threads: int, precision: FixedPrecision
    ) -> None:
        self._core, self._path, self._outputs = core, path, outputs
        self._options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Pinned threads of two processes, or of two models in one, would share one core while others idle.
            "ENABLE_CPU_PINNING": False,
        }
        self._requests: dict[tuple[tuple[int, ...], ...], ov.InferRequest] = {}
        self.inputs = frozenset(entry.any_name for entry in self._read().inputs)

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        shapes = {name: value.shape for name, value in feed.items()}
        key = tuple(shapes[name] for name in sorted(shapes))
        if key not in self._requests:
            self._requests[key] = self._compile(shapes)
        results = self._requests[key].infer(feed, share_inputs=True)
        return [results[name] for name in self._outputs]

    def _read(self) -> ov.Model:
        try:
            return self._core.read_model(self._path)
        except RuntimeError as error:
            raise self._refused(error) from None

    def _compile(self, shapes: Mapping[str, tuple[int, ...]]) -> ov.InferRequest:
        model = self._read()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise self._refused(error) from None
        wanted, found = self._options["INFERENCE_PRECISION_HINT"], compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != wanted:
            raise RuntimeUnavailable(f"{self._path} was compiled in {found} and not in {wanted}; use float32")
        return compiled.create_infer_request()

    def _refused(self, error: RuntimeError) -> BundleError:
        """OpenVINO's messages begin with the places in its own sources that they passed through."""
        lines = [line.strip() for line in str(error).splitlines()]
        telling = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
        return BundleError(f"{self._path} does not load in openvino: {(telling or lines)[0]}; export the bundle again")
