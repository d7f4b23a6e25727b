"""The child process that builds one TensorRT engine: a builder that crashes takes nothing along. No torch.

python -m distill.export.build < request.json > reply.json

The request names the flavour, the ONNX file, the engine's file, the shapes of the profile and, for ``tensorrt``, a file
for the timing cache. The reply holds the engine's bytes on disk, seconds and the architecture, or the builder's error.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.engines.cuda import CudaUnavailable, find_gpu
from distill.engines.tensorrt import PORTABLE, EngineRefused, Flavour, Log, package


@dataclass(frozen=True)
class Request:
    """One engine to build. shapes: least, usual and greatest shape by input; fixed inputs may be left out."""

    flavour: Flavour
    onnx: str
    engine: str
    shapes: dict[str, list[list[int]]]
    timing_cache: str | None = None


@dataclass(frozen=True)
class Reply:
    """What became of it. error is empty for an engine that was written."""

    error: str = ""
    architecture: str = ""
    version: str = ""
    duration_s: float = 0.0


class BuildError(Exception):
    """TensorRT does not take the graph; the message is its own."""


def build(request: Request) -> Reply:
    """Parse the graph and write the engine. Raises BuildError, EngineRefused or OSError."""
    trt = package(request.flavour)
    started = time.perf_counter()
    architecture = PORTABLE
    if request.flavour == "tensorrt":
        try:
            architecture = find_gpu().architecture
        except CudaUnavailable as error:
            raise BuildError(
                f"tensorrt builds on the GPU that it is for: {error}; tensorrt-rtx builds anywhere"
            ) from None
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network, _parser = parse(trt, builder, log, Path(request.onnx))  # weights live as long as the parser
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # 10 bits of mantissa are not the float32 that the parity gate asks for
    config.add_optimization_profile(profile(builder, network, request.shapes))
    cache = _timing_cache(config, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(log.reason)
    Path(request.engine).write_bytes(engine)
    if cache is not None:
        Path(str(request.timing_cache)).write_bytes(cache.serialize())
    return Reply("", architecture, str(trt.__version__), time.perf_counter() - started)


def parse(trt: Any, builder: Any, log: Log, onnx: Path) -> tuple[Any, Any]:
    """The network of an ONNX file and its parser. Strongly typed: every tensor has the type that the file says.

    Raises BuildError with the parser's first complaint.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = [f"{e.node_operator() or 'graph'}: {e.desc().strip()}" for e in errors]
        raise BuildError(told[0] if told else log.reason)
    return network, parser


def profile(builder: Any, network: Any, shapes: dict[str, list[list[int]]]) -> Any:
    """The optimisation profile of a network. Raises BuildError for a free input without shapes."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tuple(tensor.shape):
            continue
        if tensor.name not in shapes:
            raise BuildError(f"input {tensor.name} has free axes {tuple(tensor.shape)} and no shapes were given")
        made.set_shape(tensor.name, *(tuple(shape) for shape in shapes[tensor.name]))
    return made


def _timing_cache(config: Any, request: Request) -> Any:
    """Kernel timings of earlier builds on this GPU; TensorRT-RTX times nothing when it builds."""
    if request.flavour != "tensorrt" or request.timing_cache is None:
        return None
    file = Path(request.timing_cache)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, False)  # of another device or version: ignored, not used
    return cache


def main() -> int:
    request = Request(**json.load(sys.stdin))
    try:
        reply = build(request)
    except (BuildError, EngineRefused, OSError) as error:
        reply = Reply(error=str(error))
    json.dump(asdict(reply), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
