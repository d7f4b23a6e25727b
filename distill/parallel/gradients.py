"""Gradients of several ranks: averaged where networks are whole copies, measured and clipped wherever they lie.

torch's DistributedDataParallel is not used: it hooks one forward call of one module per backward pass, while a role
is called by families and hooks several times a step, with partial derivatives in between. Gradients are averaged once
per optimizer step instead, after the last micro-batch, in flat buckets; those of shards are FSDP2's own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.parallel.shard import full, local
from distill.parallel.world import World

BUCKET = 25 * 2**20
"""Bytes that are averaged at once, as torch's own default."""


def average(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace gradients of whole parameters by their mean over all ranks; those of shards are FSDP2's affair."""
    if world.size == 1:
        return
    for bucket in buckets([p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world.size
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def buckets(gradients: list[Tensor], size: int = BUCKET) -> Iterator[list[Tensor]]:
    """Gradients of one dtype in lists of at most ``size`` bytes, and at least one."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or sum(g.nbytes for g in [*bucket, gradient]) > size):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit`` and return the norm before, over all shards of all ranks."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g for g in gradients if isinstance(g, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, limit)
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    parts = [full(nn.utils.get_total_norm(some)) for some in (shards, whole) if some]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    torch._foreach_mul_([local(g) for g in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
