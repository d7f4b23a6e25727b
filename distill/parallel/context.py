"""One sample on several ranks: each works on a part of its tokens, and of its heads inside self-attention.

    parallel: {strategy: fsdp, context: 4}     # ranks 0–3 share their micro-batches, ranks 4–7 share theirs, …

DeepSpeed-Ulysses (arXiv 2309.14509, §3): what acts token by token runs on N-th parts of the sequence; before attention
an all-to-all turns (all heads, own tokens) into (own heads, all tokens), and another one turns the result back. Parts
of a sequence that N does not divide differ by one token. Time and text embeddings, and the first projection of the
latents, are computed by every rank.

Every rank of a group draws the same, sees the network's whole output and computes the same loss, so that all ranks of a
run can average their gradients: the loss counts once per rank, hence the gradient of a part is N times what the loss of
one rank gives it (``_Whole``), and the mean over ranks is the gradient of one process. Nothing outside of the network
knows that there are parts.

diffusers has context parallelism of its own, made for inference (``enable_parallelism``). It is not used: in 0.42.1 it
divides by the number of accelerators, which is 0 on a CPU; its attention calls torch's kernel again in the backward
pass, outside of the forward pass's autocast, where Wan's float32 queries meet bfloat16 values; gradients with respect
to a network's input are those of one part alone; and tokens must divide, or ranks ask each other for their number
before each attention. Its hooks and its attention do run on gloo, with the same output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(eq=False)
class Context:
    """The ranks that share a network's sequence. sizes: tokens of each in the present pass, set where it is cut."""

    group: dist.ProcessGroup
    ranks: int
    rank: int
    sizes: list[int] = field(default_factory=list)

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of (B, S, …)."""
        return torch.split(x, self.sizes, dim=1)[self.rank]


_CONTEXTS: WeakKeyDictionary[nn.Module, Context] = WeakKeyDictionary()


def context_groups(ranks: int) -> Context:
    """Groups of ``ranks`` consecutive ranks; the one of this rank. All ranks of the run must call it."""
    group, _ = dist.new_subgroups(group_size=ranks)
    return Context(group, ranks, dist.get_rank(group))


def share_sequence(network: nn.Module, groups: Context) -> None:
    """Let a network run on the parts of the ranks of a group. Its inputs and outputs are whole, and the same on each.

    Raises ValueError for another class than Wan's transformer, and for heads that do not divide.
    """
    check_sequence(network, groups.ranks)
    shared: Any = network
    own = _CONTEXTS[network] = Context(groups.group, groups.ranks, groups.rank)
    shared.register_forward_pre_hook(lambda _, inputs, named: _joined(inputs, named, own), with_kwargs=True)
    shared.patch_embedding.register_forward_hook(lambda _, inputs, output: _cut(output, own))
    shared.proj_out.register_forward_hook(lambda _, inputs, output: _Whole.apply(output, own))
    for attention in (block.attn1 for block in shared.blocks):
        attention.heads //= groups.ranks
        for module in (attention.norm_q, attention.norm_k, attention.to_v):
            module.register_forward_hook(lambda _, inputs, output: _ToHeads.apply(output, own))
        attention.to_out[0].register_forward_pre_hook(lambda _, inputs: (_ToTokens.apply(inputs[0], own),))


def check_sequence(network: nn.Module, ranks: int) -> None:
    """Raises ValueError if ``ranks`` ranks cannot share a network's sequence."""
    if not isinstance(network, WanTransformer3DModel):
        raise ValueError(
            f"parallel.context is {ranks}, and {type(network).__name__} has no sequence that can be shared; "
            "use context: 1, or a teacher of the wan family"
        )
    config: Any = network.config
    heads = int(config.num_attention_heads)
    if heads % ranks:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"parallel.context is {ranks} for {heads} heads of attention; use one of {fitting}")


def whole_sequence(network: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, S, D) that were tapped inside a network, of all ranks that share its sequence."""
    own = _CONTEXTS.get(getattr(network, "base", network))
    if own is None:
        return tokens
    whole: Tensor = _Whole.apply(tokens, own)
    return whole


def _joined(inputs: tuple[Any, ...], named: dict[str, Any], own: Context) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The network's input, whose gradient is the mean over ranks as that of its weights is."""
    x = named.get("hidden_states", inputs[0] if inputs else None)
    if not isinstance(x, Tensor) or not x.requires_grad:
        return inputs, named
    joined = _Mean.apply(x, own)
    return ((joined, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": joined})


def _cut(patches: Tensor, own: Context) -> Tensor:
    """(B, D, f, h, w) to this rank's tokens as (B, D, s, 1, 1), which the network flattens."""
    tokens = patches.flatten(2)
    total = tokens.shape[2]
    if total < own.ranks:
        raise ValueError(f"{total} tokens for parallel.context = {own.ranks} ranks; use fewer")
    own.sizes = [total // own.ranks + (rank < total % own.ranks) for rank in range(own.ranks)]
    return torch.split(tokens, own.sizes, dim=2)[own.rank].clone()[..., None, None]


class _Whole(torch.autograd.Function):
    """(B, s, D) of each rank to (B, S, D) on all. Backward: the own part, times N; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Context) -> Tensor:
        ctx.own, ctx.sizes = own, list(own.sizes)
        most = max(own.sizes)
        padded = x.new_zeros(len(x), most, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in own.sizes]
        dist.all_gather(parts, padded, group=own.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, own.sizes, strict=True)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.split(ctx.sizes, dim=1)[ctx.own.rank] * ctx.own.ranks, None


class _ToHeads(torch.autograd.Function):
    """(B, s, H·d) of this rank's tokens to (B, S, H·d/N) of its heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Context) -> Tensor:
        ctx.own, ctx.sizes = own, list(own.sizes)
        return _to_heads(x, own, ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(gradient, ctx.own, ctx.sizes), None


class _ToTokens(torch.autograd.Function):
    """The inverse of _ToHeads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Context) -> Tensor:
        ctx.own, ctx.sizes = own, list(own.sizes)
        return _to_tokens(x, own, ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_heads(gradient, ctx.own, ctx.sizes), None


class _Mean(torch.autograd.Function):
    """x. Backward: the mean of the gradients of all ranks of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Context) -> Tensor:
        ctx.own = own
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.own.group)
        return total / ctx.own.ranks, None


def _to_heads(x: Tensor, own: Context, sizes: list[int]) -> Tensor:
    by_rank = x.unflatten(2, (own.ranks, -1)).permute(2, 0, 1, 3).contiguous()  # (N, B, s, h)
    rows, width = len(x), by_rank.shape[-1]
    parts = _exchange(by_rank, [rows * size * width for size in sizes], own)
    return torch.cat([part.view(rows, -1, width) for part in parts], dim=1)


def _to_tokens(x: Tensor, own: Context, sizes: list[int]) -> Tensor:
    by_rank = torch.cat([part.reshape(-1) for part in x.split(sizes, dim=1)])
    rows, mine, width = len(x), sizes[own.rank], x.shape[2]
    parts = _exchange(by_rank, [rows * mine * width] * own.ranks, own, [rows * size * width for size in sizes])
    return torch.cat([part.view(rows, mine, width) for part in parts], dim=2)


def _exchange(x: Tensor, received: list[int], own: Context, sent: list[int] | None = None) -> tuple[Tensor, ...]:
    """Send the N parts of x, of ``sent`` elements each (None: equal), to the ranks; what each of them sent, flat."""
    result = x.new_empty(sum(received))
    dist.all_to_all_single(result, x.view(-1), received, sent, group=own.group)
    return tuple(torch.split(result, received))
