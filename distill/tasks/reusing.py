"""Advantages that the fake score's own iterations take over from the last one that trained the student.

The student has moved by one step since, so the same prompts, noise and step of the grid give nearly the same samples:
nothing is decoded or scored, and the advantage is the one that was. One of the cheap variants of AMD's reward, ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.config import RecipeError
from distill.parallel.world import World

ROOM = 1 << 14
"""Most samples per optimizer step. Checkpoints always hold as many, so that a run goes on with another batch."""


class KeptAdvantages(nn.Module):
    """The raw advantages of all micro-batches of one iteration, held alike by every rank and on the host.

    values: (ROOM,) float32 in the order of micro-batches, zeros behind them; about: (3,) int64, the iteration that they
    are of, its micro-batches and its samples, −1 and zeros before the first.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size > ROOM:
            raise RecipeError(
                f"batch_size is {batch_size} and advantage.when reuse keeps at most {ROOM} advantages; use when: "
                "student, or a smaller batch_size"
            )
        self.values: Tensor
        self.about: Tensor
        self.register_buffer("values", torch.zeros(ROOM))
        self.register_buffer("about", torch.tensor([-1, 0, 0]))

    def keep(self, iteration: int, advantages: Mapping[int, Tensor], world: World) -> None:
        """Take this rank's advantages by micro-batch, (B,) each, in the place of what was kept; all ranks must call it.

        They wait for the device.
        """
        told = world.gather(dict(zip(advantages, torch.stack(list(advantages.values())).cpu(), strict=True)))
        everyones = {micro: advantage for part in told for micro, advantage in part.items()}
        joined = torch.cat([everyones[micro] for micro in sorted(everyones)])
        self.values[: len(joined)] = joined
        self.about.copy_(torch.tensor([iteration, len(everyones), len(joined)]))

    def of(self, iteration: int, micro: int, micros: int, size: int) -> Tensor:
        """What was kept of a micro-batch of ``size`` samples, one of ``micros``, on the host: (size,).

        Zeros where nothing was, or where it was of another iteration or another split of another batch.
        """
        if self.about.tolist() != [iteration, micros, micros * size]:
            return torch.zeros(size)
        return self.values[micro * size : (micro + 1) * size].clone()
