"""A graph that fails its gate is told apart by its first wrong layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from distill.bundle import Bundle
from distill.export.graphs import GraphSpec, decoder_graph, to_uint8
from distill.export.layers import first_difference
from distill.export.onnx import ExportError, compile_graph
from distill.export.parity import OnnxGraph
from distill.export.run import verify


class Small(nn.Module):
    """Four named layers, one of them normalising, then pixels, 4 x 4 per latent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.middle, self.conv_out = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()), nn.Conv2d(16, 3, 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.norm(self.conv_in(latents)))
        return to_uint8(nn.functional.interpolate(torch.tanh(self.conv_out(hidden)), scale_factor=4.0))


@pytest.fixture(scope="module")
def spec(tiny_sources: Path) -> GraphSpec:
    module = Small().half().float().eval().requires_grad_(False)
    return decoder_graph(module, Bundle.open(tiny_sources).manifest)


@pytest.fixture(scope="module")
def whole(spec: GraphSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "decoder.onnx"
    compile_graph(spec, path)
    return path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Callable[[str, float], Path]:
    """The graph with one initialiser scaled."""

    def damage(name: str, factor: float) -> Path:
        model = onnx.load(whole)
        (tensor,) = [t for t in model.graph.initializer if t.name.startswith(name)]
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))
        onnx.save(model, tmp_path / "damaged.onnx")
        return tmp_path / "damaged.onnx"

    return damage


def test_the_gate_names_the_layer_that_was_damaged(spec: GraphSpec, damaged: Callable[[str, float], Path]) -> None:
    file = damaged("middle.0.weight", 1.5)
    with pytest.raises(ExportError, match=r"decoder\.image .* differs from torch: .*; they part first at middle\.0 "):
        verify(spec, OnnxGraph(file), file, 22)


@pytest.mark.parametrize(("initialiser", "layer"), [("conv_in.bias", "conv_in"), ("conv_out.weight", "conv_out")])
def test_layers_before_the_damage_are_not_blamed(
    spec: GraphSpec, damaged: Callable[[str, float], Path], initialiser: str, layer: str
) -> None:
    assert f"part first at {layer} (node " in first_difference(spec, damaged(initialiser, 1.2), 22)


def test_a_graph_without_damage_blames_no_layer(spec: GraphSpec, whole: Path) -> None:
    assert first_difference(spec, whole, 22).startswith("every layer alone is within its tolerance")


def test_a_wrong_operator_is_named_too(spec: GraphSpec, whole: Path, tmp_path: Path) -> None:
    """Not weights but the graph itself: the activation after the second convolution becomes another."""
    model = onnx.load(whole)
    (node,) = [node for node in model.graph.node if node.op_type == "Sigmoid"]
    node.op_type = "Tanh"
    onnx.save(model, tmp_path / "damaged.onnx")
    assert "part first at middle.1 (node " in first_difference(spec, tmp_path / "damaged.onnx", 22)
