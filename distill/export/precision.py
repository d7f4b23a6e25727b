"""A float32 ONNX graph in float16 or bfloat16, with the parts that need it kept in float32.

Which parts those are is measured: every group of MEASURED is lowered alone, in a model of the arithmetic that runs
anywhere: operators compute in float32 and round what they read and give, as matrix units with float32 accumulators do.
A group that costs more than COST_DB stays in float32.

    time      from the timestep to the first product: in bfloat16 the angle 999·f of a sinusoid is off by radians
    norm      group, layer and root-mean-square norms. Always float32: they sum thousands of squares inside one
              operator, where the measure does not see how a kernel rounds, and where float16 overflows
    softmax   of attention
    tail      after the last product: guidance, the sampler's sums, clamping to pixels

An operator that has no reduced form in ONNX stays in float32 as well.

Weights stay float16 in the file, and are cast where they are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto, helper

Reduced = Literal["float16", "bfloat16"]
Group = Literal["time", "norm", "softmax", "tail"]
GROUPS: tuple[Group, ...] = ("time", "norm", "softmax", "tail")
MEASURED: tuple[Group, ...] = ("time", "softmax", "tail")
COST_DB = 0.5
"""What a group may cost, alone, and still be lowered."""

TYPES: dict[Reduced, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
NORMS = frozenset({"GroupNormalization", "LayerNormalization", "InstanceNormalization", "RMSNormalization"})
INTEGERS = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
CONDITIONS = frozenset(
    {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "IsNaN", "IsInf"}
)
MAKERS = frozenset({"Constant", "ConstantOfShape", "Range", "RandomNormalLike", "EyeLike"})
"""Operators whose type is in an attribute; what they make is cast where it is read."""
FLOAT_INPUTS = {"Resize": frozenset({1, 2})}
"""Inputs that are float32 whatever the others are: regions and scales."""


@dataclass(frozen=True)
class Plan:
    """What of a graph is of which type and group. Nodes by index."""

    floats: frozenset[str]
    """Values of type float32."""
    weights: dict[str, str]
    """The float16 initialiser behind a value that is cast from it."""
    groups: dict[Group, frozenset[int]]

    def lowered(self, model: onnx.ModelProto, precision: Reduced, keep: Collection[Group]) -> frozenset[int]:
        """Nodes that are computed in the reduced type when ``keep`` stay in float32."""
        kept = frozenset[int]().union(*(self.groups[group] for group in keep))
        opset = next(entry.version for entry in model.opset_import if not entry.domain)
        return frozenset(
            index
            for index, node in enumerate(model.graph.node)
            if index not in kept
            and node.op_type not in MAKERS
            and node.output[0] not in self.weights
            and any(name in self.floats for name in node.output)
            and exists_in(node.op_type, opset, precision)
        )


@functools.cache
def exists_in(op_type: str, opset: int, precision: Reduced) -> bool:
    """Whether ONNX defines an operator for this type wherever it does for float32."""
    schema = onnx.defs.get_schema(op_type, opset)
    allowed = [constraint.allowed_type_strs for constraint in schema.type_constraints]
    return all(f"tensor({precision})" in types for types in allowed if "tensor(float)" in types)


def plan(model: onnx.ModelProto) -> Plan:
    """Read a graph of distill.export.onnx."""
    floats = {name for name, kind in value_types(model).items() if kind == TensorProto.FLOAT}
    halves = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    weights = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in halves}
    nodes = list(model.graph.node)
    groups: dict[Group, frozenset[int]] = {
        "time": _time(model, weights),
        "norm": frozenset(i for i, node in enumerate(nodes) if node.op_type in NORMS),
        "softmax": frozenset(i for i, node in enumerate(nodes) if node.op_type == "Softmax"),
        "tail": _tail(nodes),
    }
    return Plan(frozenset(floats), weights, groups)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value of a graph. ONNX's own inference stops at GroupNormalization."""
    graph = model.graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for node in graph.node:
        if node.op_type in ("Cast", "Constant", "ConstantOfShape"):
            kind = _type_attribute(node)
        elif node.op_type in INTEGERS:
            kind = TensorProto.INT64
        elif node.op_type in CONDITIONS:
            kind = TensorProto.BOOL
        else:
            kind = found[node.input[1 if node.op_type == "Where" else 0]]
        found |= dict.fromkeys(node.output, kind)
    return found


def _type_attribute(node: onnx.NodeProto) -> int:
    given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if "to" in given:
        return int(given["to"])
    if "value" in given:
        return int(given["value"].data_type)
    return TensorProto.INT64 if given.keys() & {"value_int", "value_ints"} else TensorProto.FLOAT


def _time(model: onnx.ModelProto, weights: Collection[str]) -> frozenset[int]:
    """Nodes that depend on the timestep and constants alone, up to the first product."""
    constant = {t.name for t in model.graph.initializer} | set(weights) | {""}
    inside, found = {"timestep"}, set()
    for index, node in enumerate(model.graph.node):
        if node.op_type in MAKERS and not node.input:
            constant |= set(node.output)
        reads = set(node.input) - constant
        if reads and reads <= inside and node.op_type not in PRODUCTS:
            inside |= set(node.output)
            found.add(index)
    return frozenset(found)


def _tail(nodes: list[onnx.NodeProto]) -> frozenset[int]:
    """Nodes after which no product comes and that something else than a product's own operands leads to."""
    leads_on: set[str] = set()
    found = set()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if node.op_type in PRODUCTS or leads_on & set(node.output):
            leads_on |= set(node.input)
        else:
            found.add(index)
    return frozenset(found)


def lower(model: onnx.ModelProto, precision: Reduced, keep: Collection[Group]) -> onnx.ModelProto:
    """The graph with its lowered nodes in the reduced type; inputs and outputs of the graph stay float32."""
    read = plan(model)
    low, kind = read.lowered(model, precision, keep), TYPES[precision]
    made = _Rewrite(model, read)
    reduced = {name for index in low for name in model.graph.node[index].output if name in read.floats}

    def as_low(name: str) -> str:
        if name in reduced:
            return made.inner(name)
        if precision == "float16" and name in read.weights:
            return read.weights[name]
        return made.cast(read.weights.get(name, name), kind, f"{name}.{precision}")

    for index, node in enumerate(model.graph.node):
        if node.output[0] in read.weights:
            continue  # cast again where it is read
        if index in low:
            if node.op_type == "Cast":
                node = _cast_to(node, kind)
            made.add(node, _each_float(node, read.floats, as_low), made.inner)
        else:
            made.add(node, lambda name: made.full(name, name in reduced), lambda name: name)
    for value in model.graph.output:
        if value.name in reduced:
            made.cast(made.inner(value.name), TensorProto.FLOAT, value.name)
    return made.finish()


def rounded(model: onnx.ModelProto, precision: Reduced, keep: Collection[Group]) -> onnx.ModelProto:
    """The same choice of nodes in float32, with what they read and give rounded to the reduced type."""
    read = plan(model)
    low, kind = read.lowered(model, precision, keep), TYPES[precision]
    made = _Rewrite(model, read)
    reduced = {name for index in low for name in model.graph.node[index].output if name in read.floats}

    def round_once(name: str) -> str:
        short = made.cast(name, kind, f"{name}.short")
        return made.cast(short, TensorProto.FLOAT, f"{name}.rounded")

    def as_low(name: str) -> str:
        if name in reduced:
            return name
        return round_once(made.full(name, False))

    for index, node in enumerate(model.graph.node):
        if node.output[0] in read.weights:
            continue
        if index in low:
            made.add(node, _each_float(node, read.floats, as_low), lambda n: f"{n}.exact" if n in reduced else n)
            for name in (name for name in node.output if name in reduced):
                made.cast(f"{name}.exact", kind, f"{name}.short")
                made.cast(f"{name}.short", TensorProto.FLOAT, name)
        else:
            made.add(node, lambda name: made.full(name, False), lambda name: name)
    return made.finish()


class _Rewrite:
    """A graph that is written node by node; casts are made once per value and type."""

    def __init__(self, model: onnx.ModelProto, read: Plan) -> None:
        self._model, self._read = model, read
        self._outputs = {value.name for value in model.graph.output}
        self._nodes: list[onnx.NodeProto] = []
        self._made: set[str] = set()

    def inner(self, name: str) -> str:
        """What a reduced value is called: an output of the graph has its name for the float32 one."""
        return f"{name}.low" if name in self._outputs else name

    def cast(self, source: str, kind: int, name: str) -> str:
        if name not in self._made:
            self._made.add(name)
            self._nodes.append(helper.make_node("Cast", [source], [name], name=f"{name}.cast", to=kind))
        return name

    def full(self, name: str, is_reduced: bool) -> str:
        """The float32 of a value, of a weight too."""
        if name in self._read.weights:
            return self.cast(self._read.weights[name], TensorProto.FLOAT, name)
        return self.cast(self.inner(name), TensorProto.FLOAT, f"{name}.float32") if is_reduced else name

    def add(self, node: onnx.NodeProto, inputs: Callable[[str], str], outputs: Callable[[str], str]) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = _renamed(node.input, inputs)
        copy.output[:] = _renamed(node.output, outputs)
        self._nodes.append(copy)

    def finish(self) -> onnx.ModelProto:
        made = onnx.ModelProto()
        made.CopyFrom(self._model)
        del made.graph.node[:], made.graph.value_info[:]
        made.graph.node.extend(self._nodes)
        onnx.checker.check_model(made, full_check=True)
        return made


def _renamed(names: Iterable[str], rename: Callable[[str], str]) -> list[str]:
    return [rename(name) if name else "" for name in names]


def _each_float(node: onnx.NodeProto, floats: Collection[str], rename: Callable[[str], str]) -> Callable[[str], str]:
    """Rename a node's inputs that are float32 and may be of another type."""
    fixed = {node.input[at] for at in FLOAT_INPUTS.get(node.op_type, ()) if at < len(node.input)}
    return lambda name: rename(name) if name in floats and name not in fixed else name


def _cast_to(node: onnx.NodeProto, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", list(node.input), list(node.output), name=node.name, to=kind)


def choose_kept(measure: Callable[[Collection[Group]], float]) -> tuple[tuple[Group, ...], dict[str, float]]:
    """The groups to keep in float32, and what was measured: dB with all of them kept, and with one lowered.

    measure: psnr_db of the graph with these groups kept.
    """
    all_kept = measure(GROUPS)
    found = {"all kept": all_kept}
    for group in MEASURED:
        found[group] = measure([other for other in GROUPS if other != group])
    kept = tuple(group for group in GROUPS if group not in MEASURED or not found[group] >= all_kept - COST_DB)
    return kept, {name: round(value, 2) for name, value in found.items()}
