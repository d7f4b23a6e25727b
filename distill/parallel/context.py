"""One sample on several ranks: each works on a part of its tokens, and of its heads inside self-attention.

    parallel: {strategy: fsdp, context: 4}     # ranks 0–3 share their micro-batches, ranks 4–7 share theirs, …

DeepSpeed-Ulysses (arXiv 2309.14509, §3) as diffusers has it: its plan of the model says where a sequence is cut and
put together again, and its attention turns (all heads, own tokens) into (own heads, all tokens) and back. Tokens and
heads must divide by the number of ranks. Time and text embeddings, and the first projection of the latents, are
computed by every rank.

What training needs beside it is here. Every rank of a group draws the same, sees the network's whole output and
computes the same loss, so that all ranks of a run can average their gradients: the loss counts once per rank, hence
the gradient of a part is N times what the loss of one rank gives it, and the mean over ranks is the gradient of one
process. Nothing outside of the network knows that there are parts.

diffusers' one call for all of it, ``enable_parallelism``, asks for an accelerator and divides by their number, so that
its pieces are put together here; and its attention runs again in the backward pass outside of autocast, so that
queries and keys get the precision of values before they are turned by their places.
"""

from __future__ import annotations

from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.parallel.device import device

_MESHES: WeakKeyDictionary[nn.Module, DeviceMesh] = WeakKeyDictionary()
"""The ranks that share a network's sequence."""


def context_groups(ranks: int) -> DeviceMesh:
    """Groups of ``ranks`` consecutive ranks; the one of this rank. All ranks of the run must call it."""
    shape, names = (dist.get_world_size() // ranks, 1, ranks), ("groups", "ring", "ulysses")
    return init_device_mesh(device().type, shape, mesh_dim_names=names)["ring", "ulysses"]


def share_sequence(network: nn.Module, group: DeviceMesh) -> None:
    """Let a network run on the parts of the ranks of a group. Its inputs and outputs are whole, and the same on each.

    Raises ValueError for another class than Wan's transformer, for heads that do not divide, and, when it runs, for
    tokens that do not.
    """
    ranks = group.size()
    check_sequence(network, ranks)
    shared: Any = network
    shared.register_forward_pre_hook(lambda net, inputs, named: _received(net, inputs, named, group), with_kwargs=True)
    shared.set_attention_backend("native")
    config = ContextParallelConfig(ulysses_degree=ranks, mesh=group)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), dist.get_world_size(), device(), mesh=group)
    for attention in (block.attn1 for block in shared.blocks):
        attention.processor._parallel_config = parallel
        for norm in (attention.norm_q, attention.norm_k):
            norm.register_forward_hook(_as_values)
    # Its entry for "" cuts times per token, of which there are none here.
    apply_context_parallel(network, config, {name: entry for name, entry in shared._cp_plan.items() if name})
    shared.proj_out.register_forward_hook(lambda _, inputs, output: _Times.apply(output, ranks))
    _MESHES[network] = config._flattened_mesh


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
        raise ValueError(f"parallel.context is {ranks} for {heads} heads of attention; use one of {_divisors(heads)}")


def check_tokens(network: Any, latents: Tensor, ranks: int) -> None:
    """Raises ValueError if the tokens of (B, C, F, h, w) do not divide by ``ranks``."""
    tokens = latents[0, 0].numel() // prod(network.config.patch_size)
    if tokens % ranks:
        raise ValueError(
            f"parallel.context is {ranks} for {tokens} tokens; use one of {_divisors(tokens)}, or another size"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)


def whole_sequence(network: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, S, D) that were tapped inside a network, of all ranks that share its sequence."""
    mesh = _MESHES.get(getattr(network, "base", network))
    if mesh is None:
        return tokens
    whole: Tensor = _Times.apply(EquipartitionSharder.unshard(tokens, 1, mesh), mesh.size())
    return whole


def _received(
    network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], group: DeviceMesh
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The network's input, whose gradient is the mean over ranks as that of its weights is."""
    x = inputs[0] if inputs else named["hidden_states"]
    check_tokens(network, x, group.size())
    x = _Mean.apply(x, group.get_group("ulysses"))
    return ((x, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": x})


def _as_values(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Under autocast, queries or keys in the precision of the values beside them."""
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


class _Times(torch.autograd.Function):
    """x. Backward: the gradient times a number of ranks; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None


class _Mean(torch.autograd.Function):
    """x. Backward: the mean of the gradients of all ranks of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total / dist.get_world_size(ctx.group), None
