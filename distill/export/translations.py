"""Operators of torch that the exporter would write as more, or slower, nodes than they need.

    group_norm                     Its GroupNormalization is unfolded by ONNX Runtime into twenty nodes on a CPU.
                                   InstanceNormalization over rows of (B, G, C/G·H·W) has a kernel everywhere.
    scaled_dot_product_attention   It scales queries and keys, each by √scale, and turns keys by way of three axes,
                                   whose sides it asks for at run time.

Together they take a tenth off a step of scenes-sdxl (docs/export.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxscript import opset18 as op

Value = Any
"""A value of the graph in the making: its shape is a sequence of numbers and of names of free axes."""


def group_norm(
    x: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    """torch.nn.functional.group_norm. x: (B, C, …)."""
    sides = list(x.shape)
    rows = op.Reshape(x, _numbers([0, num_groups, -1]))
    ones, zeros = np.ones(num_groups, np.float32), np.zeros(num_groups, np.float32)
    normal = op.InstanceNormalization(rows, _constant(ones), _constant(zeros), epsilon=eps)
    normal = op.Reshape(normal, _numbers([0, *sides[1:]]) if _known(sides[1:]) else op.Shape(x))
    channels = _numbers([-1, *(1,) * (len(sides) - 2)])
    if weight is not None:
        normal = op.Mul(normal, op.Reshape(weight, channels))
    return normal if bias is None else op.Add(normal, op.Reshape(bias, channels))


def attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """torch.nn.functional.scaled_dot_product_attention at inference. query: (…, L, d); a causal L must be a number.

    A mask of booleans leaves a row that sees nothing at 0, as torch does. Raises NotImplementedError for shared keys.
    """
    if enable_gqa:
        raise NotImplementedError("attention whose heads share keys is not translated")
    width = query.shape[-1]
    scaled = op.Mul(query, _constant(np.float32(width**-0.5 if scale is None else scale)))
    rank = len(key.shape)
    scores = op.MatMul(scaled, op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2]))
    if is_causal:
        later = np.triu(np.full((query.shape[-2], key.shape[-2]), -np.inf, np.float32), 1)
        scores = op.Add(scores, _constant(later))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if attn_mask.dtype != ir.DataType.BOOL:
        return op.MatMul(op.Softmax(op.Add(scores, attn_mask), axis=-1), value)
    weights = op.Softmax(op.Where(attn_mask, scores, _constant(np.float32(-np.inf))), axis=-1)
    weights = op.Where(op.IsNaN(weights), _constant(np.float32(0)), weights)
    return op.MatMul(weights, value)


def _known(sides: Sequence[object]) -> bool:
    return all(isinstance(side, int) for side in sides)


def _numbers(values: Sequence[int]) -> Value:
    return op.Constant(value_ints=list(values))


def _constant(values: NDArray[np.float32] | np.float32) -> Value:
    return op.Constant(value=numpy_helper.from_array(np.asarray(values)))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
