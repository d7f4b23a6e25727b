"""The ranks of a run: who am I, which micro-batches are mine, and what all of us agree on.

    torchrun --nproc-per-node 8 -m distill.run recipes/NAME.yaml

A recipe's ``accumulate`` is the number of micro-batches of one optimizer step over all ranks. Whatever is random is
drawn by generators that know the micro-batch and never the rank, so N ranks share the very draws of one: their number
changes the order of sums and nothing else, and the samples of a prompt stay on one rank.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from distill.parallel.device import device, prepare


@dataclass(frozen=True)
class World:
    """The ranks of this run; one process is a world of one, and talks to nobody. group: where they talk, or torch's."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def leader(self) -> bool:
        """Whether this rank writes logs, previews and results."""
        return self.rank == 0

    def micros(self, accumulate: int, context: int = 1) -> range:
        """The micro-batches of this rank, in order; ``context`` consecutive ranks share theirs.

        Raises ValueError if they cannot be shared evenly.
        """
        if self.size % context:
            raise ValueError(
                f"parallel.context is {context} for {self.size} ranks; use a divisor of {self.size}, or other ranks"
            )
        groups = self.size // context
        if accumulate % groups:
            each = f"{groups} groups of {context} ranks" if context > 1 else f"{groups} ranks"
            raise ValueError(
                f"accumulate is {accumulate}, the micro-batches of a step over all ranks, and there are {each}; "
                f"use a multiple of {groups}, such as accumulate={-(-accumulate // groups) * groups}"
            )
        share, group = accumulate // groups, self.rank // context
        return range(group * share, (group + 1) * share)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in the order of ranks; values are pickled, so tensors should lie on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def most(self, value: int) -> int:
        """The greatest value of any rank."""
        return value if self.size == 1 else max(self.gather(value))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(self.group)

    def apart(self) -> World:
        """The same ranks in a group of their own, in which another thread may talk; all of them must call it."""
        return World(self.rank, self.size, dist.new_group(backend="gloo") if self.size > 1 else None)


def world() -> World:
    """The world that torchrun's environment describes, joined on first use; a world of one without it."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        place = device()
        prepare(place)
        if place.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
