"""OpenVINO on the CPU, from the same ONNX graphs: float32, or bfloat16 where the processor multiplies in it.

Precision. OpenVINO computes float32 models in bfloat16 wherever it can unless told otherwise, so the precision is
always set, and what was compiled is asked what it became. What bfloat16 does to 128 pictures of scenes-sdxl at 4
steps, peak signal to noise against ONNX Runtime in float32 (median; all pixels together), and to one core:

    step      60.8 dB (54.0); the reason to use it, 15.4 instead of 33 ms per picture
    and time  kept in float32, see take_time_out; in bfloat16 too it is no faster and pictures lose 7 dB (15)
    decoder   57.7 dB (57.7), at most 2 levels of 255; 10.9 instead of 15.4 ms, so it is bfloat16
    text      no change of the median, and nothing to gain (0.2 ms), so it stays float32
    sampling  the sums p·x + q·m … and guidance are float32: OpenVINO leaves what follows the last product alone

Together 56.7 dB (52.8). The mean is below the median because a few seeds in a hundred take another path and end as
another picture, not a worse one (the worst of these 37 dB), so float32 is the default and bfloat16 for those whose
scores agree.

Shapes. One model is compiled per number of rows and size of picture, with every shape fixed, at the first call that
needs it: with a free batch a step took 1.3 times (float32) to 1.6 times (bfloat16) as long. Each costs half a second
and a copy of the weights for a UNet of 4 M parameters; clips of many lengths would fill the memory, so the one that was
not used for longest leaves for the seventeenth. Numbers of rows are those of service.runtimes.graphs.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import ConstantFolding, Manager

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Conditioning, FixedPrecision, RuntimeUnavailable
from service.runtimes.graphs import GraphRuntime, graph_engine

MAX_SHAPES = 16
"""Compiled models that a graph keeps."""
_HINTS = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


@functools.cache
def core() -> ov.Core:
    """The process's only Core, kept until it ends.

    Where there is AMX, each Core's CPU plugin gives the thread that loads it a signal stack, and unmaps that when the
    Core dies: in another thread, or before a later Core that would restore it. The next signal then kills the process.
    """
    made = ov.Core()
    made.set_property({"ENABLE_MMAP": False})  # a mapped file of weights that changes later changes what is served
    return made


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AMX or AVX512-BF16), so that it is faster than float32."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoRuntime(GraphRuntime):
    """Every graph compiled by OpenVINO's CPU plugin."""

    name = "openvino"

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int, precision: FixedPrecision = "float32") -> None:
        """See GraphRuntime. Raises RuntimeUnavailable for bfloat16 on a processor that has none."""
        if precision == "bfloat16" and not has_bfloat16():
            raise RuntimeUnavailable(
                "precision is bfloat16 and this processor has neither AMX nor AVX512-BF16; use float32"
            )
        super().__init__(bundle, threads=threads, max_batch=max_batch, precision=precision)

    def version(self) -> str:
        return str(ov.__version__).partition("-")[0]

    def _load(self, bundle: Bundle, graph: str) -> OpenVinoGraph:
        int8 = self.precision == "int8"  # lies in the file; what is not quantised there is float32
        engine = graph_engine(bundle, graph, "int8" if int8 else "float32")
        path = bundle.file(engine.file)
        precision: FixedPrecision = "float32" if int8 or graph == "text_encoder" else self.precision
        return OpenVinoGraph(path, tuple(engine.outputs), self.threads, precision)


class OpenVinoGraph:
    """service.runtimes.graphs.Graph as one compiled model per shape of the inputs."""

    def __init__(self, path: Path, outputs: tuple[str, ...], threads: int, precision: FixedPrecision) -> None:
        self._path, self.outputs, self._precision = path, outputs, precision
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Pinned threads of two processes, or of two models in one, would share one core while others idle.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], Callable[[Conditioning], Any]] = OrderedDict()
        try:
            # Read once: a file that changes on the disk later must not become half of what is served.
            self._model = core().read_model(path)
        except RuntimeError as error:
            raise self._refused(error) from None
        self.inputs = frozenset(entry.any_name for entry in self._model.inputs)

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        shapes = {name: value.shape for name, value in feed.items()}
        key = tuple(shapes[name] for name in sorted(shapes))
        if key not in self._compiled:
            self._compiled[key] = self._specialise(shapes)
        self._compiled.move_to_end(key)
        if len(self._compiled) > MAX_SHAPES:
            self._compiled.popitem(last=False)
        results = self._compiled[key](feed)
        return [results[name] for name in self.outputs]

    def _specialise(self, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[Conditioning], Any]:
        model = self._model.clone()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            time_model = take_time_out(model) if self._precision == "bfloat16" else None
            main = self._compile(model, self._precision)
            if time_model is None:
                return lambda feed: main.infer(feed, share_inputs=True)
            time = self._compile(time_model, "float32")
        except RuntimeError as error:
            raise self._refused(error) from None

        def both(feed: Conditioning) -> Any:
            features = time.infer({"timestep": feed["timestep"]})
            rest = {name: value for name, value in feed.items() if name != "timestep"}
            return main.infer(rest | {key.any_name: value for key, value in features.items()}, share_inputs=True)

        return both

    def _compile(self, model: ov.Model, precision: FixedPrecision) -> ov.InferRequest:
        hint = _HINTS[precision]
        compiled = core().compile_model(model, "CPU", self._options | {"INFERENCE_PRECISION_HINT": hint})
        found = compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != hint:
            raise RuntimeUnavailable(f"{self._path} was compiled in {found} and not in {hint}; use float32")
        return compiled.create_infer_request()

    def _refused(self, error: RuntimeError) -> BundleError:
        """OpenVINO's messages begin with the places in its own sources that they passed through."""
        lines = [line.strip() for line in str(error).splitlines()]
        telling = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
        return BundleError(f"{self._path} does not load in openvino: {(telling or lines)[0]}; export the bundle again")


def take_time_out(model: ov.Model) -> ov.Model | None:
    """Cut what depends on the timestep alone, its sinusoid, out of a model and into the returned model of its own.

    In bfloat16 the angle 999·f is off by radians. The main model reads the features instead of the timestep: inputs of
    the one are named as outputs of the other. The cut is before the first matrix product, where costs begin. All shapes
    must be fixed. Returns None, and leaves the model alone, when it reads no timestep.
    """
    timestep = next((p for p in model.get_parameters() if "timestep" in p.output(0).names), None)
    if timestep is None:
        return None
    fold = Manager()
    fold.register_pass(ConstantFolding())  # what is made of the timestep's shape becomes constant
    fold.run_passes(model)
    results: list[ov.Node] = []
    for source, readers in _border(model, timestep):
        name = f"time_features_{len(results)}"
        features = opset13.parameter(source.get_shape(), source.get_element_type(), name)
        features.output(0).set_names({name})
        for reader in readers:
            reader.replace_source_output(features.output(0))
        model.add_parameters([features])
        result = opset13.result(source)
        result.output(0).set_names({name})
        results.append(result)
    model.remove_parameter(timestep)
    model.validate_nodes_and_infer_types()
    return ov.Model(results, [timestep])


def _border(model: ov.Model, root: ov.Node) -> list[tuple[ov.Output, list[ov.Input]]]:
    """Outputs of nodes that depend on ``root`` and constants alone, each with its inputs of other nodes."""
    inside = {root.get_name()}
    border: dict[tuple[str, int], tuple[ov.Output, list[ov.Input]]] = {}
    for node in model.get_ordered_ops():
        sources = [(entry, entry.get_source_output()) for entry in node.inputs()]
        ours = [(entry, source) for entry, source in sources if source.get_node().get_name() in inside]
        rest = {
            source.get_node().get_type_name() for _, source in sources if source.get_node().get_name() not in inside
        }
        if ours and rest <= {"Constant"} and node.get_type_name() not in ("MatMul", "Convolution", "Result"):
            inside.add(node.get_name())
        else:
            for entry, source in ours:
                key = (source.get_node().get_name(), source.get_index())
                border.setdefault(key, (source, []))[1].append(entry)
    return list(border.values())
