"""TensorRT on an NVIDIA GPU, from the engines that a bundle holds for this machine.

An engine that does not fit is refused before it is loaded, and service.runtimes.open_runtime takes another runtime and
says why; see distill.engines.tensorrt. No engine was run by the tests, which have no GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, Engine
from distill.engines.cuda import gpu_of
from distill.engines.tensorrt import Flavour, TensorRtEngine, fitting, kernel_cache, package
from service.runtimes.base import Conditioning, FixedPrecision
from service.runtimes.graphs import GraphRuntime


class TensorRtRuntime(GraphRuntime):
    """Every graph as an engine of TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        max_batch: int,
        precision: FixedPrecision = "float32",
        replica: int = 0,
    ) -> None:
        """On the GPU number ``replica``, modulo how many there are; see GraphRuntime. Batches end where profiles do.

        Raises EngineRefused when no engine fits this machine.
        """
        self._gpu = gpu_of(replica)
        self.device = f"cuda:{self._gpu}"
        self.name, self._engines = fitting(bundle, precision, self._gpu)
        rows = greatest_rows(self._engines["step"])
        super().__init__(bundle, threads=threads, max_batch=min(max_batch, rows), precision=precision)

    def version(self) -> str:
        return str(package(self._flavour).__version__)

    @property
    def _flavour(self) -> Flavour:
        return "tensorrt" if self.name == "tensorrt" else "tensorrt-rtx"

    def _load(self, bundle: Bundle, graph: str) -> TensorRtGraph:
        path = bundle.file(self._engines[graph].file)
        return TensorRtGraph(
            TensorRtEngine(path, self._flavour, kernel_cache(path), self._gpu), tuple(self._engines[graph].outputs)
        )


def greatest_rows(engine: Engine) -> int:
    """The number of rows where an engine's profile ends."""
    assert engine.target is not None, f"{engine.file} has no target"
    return min(greatest[0] for _, _, greatest in engine.target.shapes.values())


class TensorRtGraph:
    """service.runtimes.graphs.Graph as an engine."""

    def __init__(self, engine: TensorRtEngine, outputs: tuple[str, ...]) -> None:
        self._engine, self.outputs = engine, outputs
        self.inputs = frozenset(engine.inputs)

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        results = self._engine.run(feed)
        return [results[name] for name in self.outputs]
