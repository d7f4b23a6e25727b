"""A copy of a run's state on the host, which a checkpoint is written from while training goes on.

Each rank copies what it will write: its shards, and of tensors that several ranks hold alike its share. The copy's
memory is taken once and kept for the next. On a GPU it is page-locked, and copied into on a stream of its own, so that
the host does not wait and the present stream waits (``settle``) only where state is about to change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.parallel.shard import local
from distill.parallel.world import World


class Snapshot:
    """The state as it was at the last ``take``. Memory: that of this rank's share, from the first one on."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start to copy tensors to the host, shards as DTensors; complete once ``ready`` returns."""
        self.held = {name: self._room(name, t) for name, t in tensors.items()}
        pairs = [(local(self.held[name]), local(t.detach())) for name, t in tensors.items()]
        if not any(source.is_cuda for _, source in pairs):
            for host, source in pairs:
                host.copy_(source)
            return dict(self.held)
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for host, source in pairs:
                host.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
            self._copied = self._stream.record_event()
        return dict(self.held)

    def settle(self) -> None:
        """What the present stream does from now on waits for the copy: call it before state is changed in place."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def ready(self) -> None:
        """Wait until the copy is complete; any thread may."""
        if self._copied is not None:
            self._copied.synchronize()

    def _room(self, name: str, like: Tensor) -> Tensor:
        """Host memory for a tensor: that of the last snapshot if it fits."""
        held = self.held.get(name)
        if held is not None and local(held).shape == local(like).shape and held.dtype == like.dtype:
            return held
        return torch.empty_like(
            like.detach(), device="cpu", memory_format=torch.contiguous_format, pin_memory=local(like).is_cuda
        )


def share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors that this rank writes: each on one of the ranks that hold it alike, about as many bytes on each."""
    loads: dict[int, list[int]] = {}
    mine = set[str]()
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        copies, own = _copies(tensors[name], world)
        load = loads.setdefault(copies, [0] * copies)
        owner = load.index(min(load))
        load[owner] += tensors[name].nbytes
        if owner == own:
            mine.add(name)
    return {name: t for name, t in tensors.items() if name in mine}


def _copies(tensor: Tensor, world: World) -> tuple[int, int]:
    """(How many hold the same rows of a tensor, which of them this rank is)."""
    if not isinstance(tensor, DTensor):
        return world.size, world.rank
    copies, own = 1, 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank without a place in the mesh"
    for size, placement, at in zip(tensor.device_mesh.shape, tensor.placements, coordinate, strict=True):
        if placement.is_replicate():
            copies, own = copies * size, own * size + at
    return copies, own
