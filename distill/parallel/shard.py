"""Networks in shards: FSDP2 over all ranks, or within groups of ranks that are copies of each other (HSDP).

Parameters, gradients, moments and averages stay float32 in shards, a range of rows per rank; under bfloat16 the copies
that are gathered for a forward or backward pass are bfloat16, and gradients are summed in float32. Every network is
gathered block by block and let go after each pass, also at its root, so that outside of a pass it lies in shards: that
is when averages, optimizers and hooks touch its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.parallel.device import device
from distill.parallel.options import Parallel

REACHED_INTO = (CombinedTimestepLabelEmbeddings,)
"""Modules that diffusers' networks also call from outside of the block that holds them: each is gathered on its own."""

_SKELETONS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Sharded networks, and what they were before, without values."""


def mesh_of(options: Parallel, size: int) -> DeviceMesh:
    """One dimension of shards, or replicas × shards. Raises ValueError if the ranks do not fill it."""
    if options.strategy == "fsdp":
        return init_device_mesh(device().type, (size,), mesh_dim_names=("shard",))
    if size % options.replicas:
        raise ValueError(
            f"parallel.replicas is {options.replicas} for {size} ranks; use a divisor of {size}, such as the number "
            "of machines"
        )
    shape = (options.replicas, size // options.replicas)
    return init_device_mesh(device().type, shape, mesh_dim_names=("replicate", "shard"))


def shard(network: nn.Module, blocks: tuple[type[nn.Module], ...], mesh: DeviceMesh, precision: str) -> None:
    """Shard a network in place, its ``blocks`` one by one and the rest as one. All ranks get the values of rank 0.

    The network may be on the meta device on other ranks; it is not afterwards.
    """
    whole = {name: t.detach() for name, t in _tensors(network).items()}
    _SKELETONS[network] = skeleton(network)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # t = 999 is 1000 in bfloat16; autocast casts what may be cast
    )
    for module in reversed([m for m in network.modules() if isinstance(m, (*blocks, *REACHED_INTO))]):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.register_forward_pre_hook(_keep_root)
    _fill(network, whole, mesh)


def materialise(module: nn.Module) -> None:
    """Give all ranks rank 0's values of what is whole in a module, which may be on the meta device on other ranks."""
    _fill(module, {name: t.detach() for name, t in _tensors(module).items() if not isinstance(t, DTensor)}, None)


def _keep_root(network: nn.Module, inputs: Any) -> None:
    """Keep what is outside of blocks until the backward pass if there will be one.

    FSDP2 gathers it again when a gradient reaches the network's output; one that enters at a tapped feature does not.
    """
    assert isinstance(network, FSDPModule)
    network.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False)


def sum_groups(networks: Iterable[nn.Module], *, last: bool) -> None:
    """Whether the next backward pass sums gradients over groups of ranks, which once per step is enough (HSDP)."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.set_requires_all_reduce(last)


def let_go(networks: Iterable[nn.Module]) -> None:
    """Bring networks back into shards after passes whose gradients stopped short of them."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()


@contextmanager
def kept_ties(network: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a network's parameters may be replaced; other modules that share some get the new ones as well."""
    before = dict(network.named_parameters(remove_duplicate=False))
    yield
    after = dict(network.named_parameters(remove_duplicate=False))
    replaced = {id(old): after[name] for name, old in before.items()}
    for module in (m for other in others for m in other.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replaced.get(id(parameter), parameter)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(network: nn.Module) -> nn.Module:
    """A network as it was before it was sharded, with its present values on the CPU; all ranks must call it."""
    if network not in _SKELETONS:
        return network
    plain = copy.deepcopy(_SKELETONS[network])
    for name, tensor in _tensors(network).items():
        _put(plain, name, full(tensor.detach()).cpu())
    return plain.train(network.training)


def skeleton(network: nn.Module) -> nn.Module:
    """A copy on the meta device, which takes no memory."""
    memo: dict[int, Any] = {}
    for p in network.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for b in network.buffers():
        memo[id(b)] = b.to("meta")
    return copy.deepcopy(network, memo)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that a state_dict leaves out as well."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _fill(module: nn.Module, values: Mapping[str, Tensor], mesh: DeviceMesh | None) -> None:
    """Broadcast rank 0's ``values`` one tensor at a time into a module's tensors."""
    if any(t.is_meta for t in _tensors(module).values()):
        module.to_empty(device=device())
    filled = set[int]()
    for name, tensor in _tensors(module).items():
        if id(tensor) in filled or name not in values:
            continue
        filled.add(id(tensor))
        value = values[name]
        value = torch.empty(value.shape, dtype=value.dtype, device=device()) if value.is_meta else value.to(device())
        value = value.contiguous().clone() if value.data_ptr() == local(tensor).data_ptr() else value.contiguous()
        dist.broadcast(value, 0)
        with torch.no_grad():
            if isinstance(tensor, DTensor):
                assert mesh is not None
                value = distribute_tensor(value, mesh, tensor.placements, src_data_rank=None).to_local()
            local(tensor).copy_(value)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in place._parameters:
        old = place._parameters[leaf]
        place._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
    else:
        place._buffers[leaf] = value
