"""What the exporter is told to write for an operator computes what torch computes, for any batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.export.translations import TRANSLATIONS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

BATCHES = (1, 2, 5)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def check(module: nn.Module, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> Counter[str]:
    """Compile for a free batch, compare with torch at several, and count operators. The last input is of ``dtype``."""
    torch.manual_seed(0)
    module.eval()
    examples = tuple(torch.randn(3, *shape) for shape in shapes)
    axes: list[dict[int, Any]] = [{0: torch.export.Dim.DYNAMIC} for _ in shapes]
    inputs = (*examples[:-1], _of(examples[-1], dtype))
    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        opset_version=22,
        dynamic_shapes=({"inputs": tuple(axes)} if isinstance(module, Calls) else tuple(axes)),
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for batch in BATCHES:
        drawn = [torch.randn(batch, *shape) for shape in shapes]
        drawn[-1] = _of(drawn[-1], dtype)
        (given,) = session.run(None, {name: x.numpy() for name, x in zip(names, drawn, strict=True)})
        with torch.no_grad():
            np.testing.assert_allclose(given, module(*drawn).numpy(), atol=3e-6, rtol=1e-5)
    return Counter(node.op_type for node in program.model_proto.graph.node)


def _of(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x > 0.5 if dtype is torch.bool else x.to(dtype)


@pytest.mark.parametrize("sides", [(7,), (6, 5), (3, 4, 5)], ids=len)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(sides: tuple[int, ...], affine: bool) -> None:
    norm = nn.GroupNorm(4, 12, eps=1e-3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    found = check(norm, (12, *sides))
    assert found["InstanceNormalization"] == 1
    assert not found["GroupNormalization"]
    assert not found["Shape"], "sides that are known are asked for at run time"


def test_group_norm_of_any_size() -> None:
    norm = nn.GroupNorm(4, 12).eval()
    x = torch.randn(2, 12, 4, 6)
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        norm, (x,), dynamo=True, dynamic_shapes=(free,), custom_translation_table=TRANSLATIONS, verbose=False
    )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for sides in ((1, 1, 2), (3, 9, 5)):
        x = torch.randn(sides[0], 12, *sides[1:])
        (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(given, norm(x).detach().numpy(), atol=3e-6, rtol=1e-5)


HEADS = ((2, 6, 8), (2, 5, 8), (2, 5, 8))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(scale: float | None) -> None:
    found = check(Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale)), *HEADS)
    assert found == {"Mul": 1, "Transpose": 1, "MatMul": 2, "Softmax": 1}


def test_attention_that_is_causal() -> None:
    same = ((2, 6, 8),) * 3
    found = check(Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), *same)
    assert found["Softmax"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float", "bool"])
def test_attention_with_a_mask(dtype: torch.dtype) -> None:
    masked = Calls(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    check(masked, *HEADS, (1, 6, 5), dtype=dtype)


def test_a_row_that_sees_nothing_is_zero() -> None:
    def blind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(1, 1, 6, 5, dtype=torch.bool))

    check(Calls(blind), *HEADS)


def test_heads_that_share_keys_are_refused() -> None:
    shared = Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(Exception, match="share keys"):
        check(shared, (4, 6, 8), (2, 6, 8), (2, 6, 8))
