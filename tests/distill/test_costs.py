"""Costs counted on the meta device: against sums by hand, and against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from distill.costs import Cost, count, pass_cost


class Block(nn.Module):
    """x + W₂·relu(W₁·x): what its backward pass needs is x, W₁·x (as relu's result) and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.weight * q, k, value=k)


def on_meta(made: Any, **inputs: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        return made(), {name: torch.empty(shape) for name, shape in inputs.items()}


def test_operations_of_matrix_products() -> None:
    network, inputs = on_meta(lambda: Stack(8, 3), x=(5, 8))
    forward = 3 * 2 * (2 * 5 * 8 * 32)
    assert count(network) == 3 * 2 * 8 * 32
    assert pass_cost(network, inputs) == Cost(forward)
    cost = pass_cost(network, inputs, train=True)
    # Backward: once for weights and once for inputs, except the inputs of the very first layer.
    assert (cost.forward, cost.backward) == (forward, 2 * forward - 2 * 5 * 8 * 32)
    assert all(p.grad is None for p in network.parameters())


def test_bytes_that_are_kept_with_and_without_blocks() -> None:
    network, inputs = on_meta(lambda: Stack(8, 3), x=(5, 8))
    cost = pass_cost(network, inputs, blocks=(Block,), train=True)
    inside, outside = 4 * 5 * 32, 4 * 5 * 8
    assert cost.saved == 3 * (inside + outside)
    # Computed again: the inputs of three blocks, and the largest block's own.
    assert cost.checkpointed == 3 * outside + (inside + outside)


def test_what_is_counted_is_what_autograd_keeps() -> None:
    network, x = Stack(8, 3), torch.randn(5, 8)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x)
    assert output.requires_grad
    network, inputs = on_meta(lambda: Stack(8, 3), x=(5, 8))
    assert pass_cost(network, inputs, train=True).saved == sum(storage.nbytes() for storage in kept.values())


def test_attention_is_counted_as_fused_kernels_compute_it() -> None:
    network, inputs = on_meta(Attention, q=(2, 3, 10, 4), k=(2, 3, 7, 4))
    cost = pass_cost(network, inputs, train=True)
    product = 2 * 2 * 3 * 10 * 7 * 4
    assert (cost.forward, cost.backward) == (2 * product, 5 * product)
    rows, keys = 2 * 3 * 10, 2 * 3 * 7
    # w·q and q itself, k as key and value once, the output, one number per query; nothing of 10 × 7.
    assert cost.saved == 4 * (2 * rows * 4 + keys * 4 + rows * 4 + rows)


def test_the_cost_of_a_batch_grows_with_it() -> None:
    costs = []
    for rows in (1, 3):
        network, inputs = on_meta(lambda: Stack(8, 2), x=(rows, 8))
        costs.append(pass_cost(network, inputs, blocks=(Block,), train=True))
    for name in ("forward", "backward", "saved", "checkpointed"):
        assert getattr(costs[1], name) == pytest.approx(3 * getattr(costs[0], name))
