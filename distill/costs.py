"""What one pass of a network costs, found by running it on torch's meta device: shapes without numbers, no weights.

    cost = pass_cost(network, inputs, blocks=family.wrap_plan(), train=True)
    cost.forward, cost.backward      # floating-point operations
    cost.saved, cost.checkpointed    # bytes kept for the backward pass: all, or block inputs and one block

Operations are counted by torch's own counter. Attention is counted as the fused kernels compute it: 4·B·h·L·S·d forward
(two products), 10·B·h·L·S·d backward (five, one of them recomputed), and nothing of size L × S is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Of one pass over the batch that was measured; zero where the backward pass was not asked for."""

    forward: float
    backward: float = 0.0
    saved: float = 0.0
    checkpointed: float = 0.0


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention kernel: it keeps q, k, v, its output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tally: dict[str, float]) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        ctx.tally, ctx.products = tally, 2.0 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        tally["forward"] += 2 * ctx.products
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tally["backward"] += 5 * ctx.products
        return *(torch.empty_like(saved) for saved in ctx.saved_tensors[:3]), None


class _Fused(TorchFunctionMode):
    """Replaces attention inside by its shapes, and tallies what it would compute."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = {"forward": 0.0, "backward": 0.0}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        return _FusedAttention.apply(named["query"], named["key"], named["value"], self.tally)


class _Counter(TorchDispatchMode):
    """Operations of matrix products and convolutions inside, by torch's formulas (FlopCounterMode without its tree)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


class _Kept:
    """Bytes that autograd keeps, each storage once and no parameters, with their share inside blocks."""

    def __init__(self, network: nn.Module) -> None:
        self._seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in network.parameters()}
        self.total, self.outside, self.inputs, self.largest = 0.0, 0.0, 0.0, 0.0
        self._block: float | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that its identity is not used again
            size = float(storage.nbytes())
            self.total += size
            if self._block is None:
                self.outside += size
            else:
                self._block += size
        return tensor

    def enter(self, module: nn.Module, inputs: Any, named: Any) -> None:
        self._block = 0.0
        self.inputs += sum(x.numel() * x.element_size() for x in (*inputs, *named.values()) if isinstance(x, Tensor))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.largest, self._block = max(self.largest, self._block or 0.0), None


@contextmanager
def _watched(kept: _Kept, network: nn.Module, blocks: Sequence[type[nn.Module]]) -> Iterator[None]:
    """Tell ``kept`` when blocks begin and end; they do not lie within each other."""
    handles = [
        handle
        for module in network.modules()
        if isinstance(module, tuple(blocks))
        for handle in (
            module.register_forward_pre_hook(kept.enter, with_kwargs=True),
            module.register_forward_hook(kept.leave),
        )
    ]
    try:
        with saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def pass_cost(
    network: nn.Module, inputs: Mapping[str, Any], *, blocks: Sequence[type[nn.Module]] = (), train: bool = False
) -> Cost:
    """The cost of network(**inputs), all on the meta device. train: with the backward pass of all parameters."""
    fused, kept = _Fused(), _Kept(network)
    counter = _Counter()
    with torch.device("meta"), torch.set_grad_enabled(train), fused, counter, _watched(kept, network, blocks):
        output = network(**inputs)
    computed = counter.total + fused.tally["forward"]
    if not train:
        return Cost(computed)
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    with fused, _Counter() as backward:
        output.backward(torch.empty_like(output))
    for parameter in network.parameters():
        parameter.grad = None
    return Cost(
        computed,
        backward.total + fused.tally["backward"],
        kept.total,
        kept.outside + kept.inputs + kept.largest if blocks else kept.total,
    )


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
