"""Averaged weights: one float32 copy of this rank's shards, so that an average costs no traffic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.parallel.shard import local


class Average:
    """θ̄ ← d·θ̄ + (1 − d)·θ of a module's parameters; its buffers are copied. Under FSDP2 each rank keeps its rows."""

    def __init__(self, module: nn.Module) -> None:
        self.names = list(module.state_dict())
        tensors = _tensors(module)
        kept = {id(t): t.detach().clone() for t in tensors.values()}  # tied weights are kept once
        self.own = list({id(t): t for t in tensors.values()}.values())
        self.kept = [kept[id(t)] for t in self.own]
        self.named = {name: kept[id(t)] for name, t in tensors.items()}

    def state_dict(self) -> Mapping[str, Tensor]:
        """By the names of the module's own state_dict, shards as DTensors."""
        return {name: self.named[name] for name in self.names}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """One update towards the present weights."""
        weights = [(k, o) for k, o in zip(self.kept, self.own, strict=True) if isinstance(o, nn.Parameter)]
        torch._foreach_lerp_([local(k) for k, _ in weights], [local(o) for _, o in weights], 1 - decay)
        for kept, own in zip(self.kept, self.own, strict=True):
            if not isinstance(own, nn.Parameter):
                kept.copy_(own)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the module's weights in place, tensor by tensor."""
        for kept, own in zip(self.kept, self.own, strict=True):
            mine = local(own).clone()
            local(own).copy_(local(kept))
            local(kept).copy_(mine)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
