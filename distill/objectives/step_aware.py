"""A fake score that knows which step of the student made a sample.

One fake score of many steps models their mixture, and a mixture can be right while no step is: too sharp last steps
make up for blurred first ones. TDM (arXiv 2503.06674) separates what a student of several numbers of steps learns in
each by telling its networks the number.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from distill.objectives.plan import Hook, Roles, Rollout, Terms
from distill.parallel.device import device


class StepAwareFake(Hook):
    """φ's time embedding plus a learned row per (number of steps, step), zero at first.

    The first step has one row for all numbers, because it sees the same input in each. Ours is the row for the step
    and that the student itself, whose network is deployed, is told nothing (TDM tells both the number alone).
    """

    terms = Terms(extra="d_fake knows the student's step")

    def __init__(self, roles: Roles, steps: tuple[int, ...]) -> None:
        later = [(number, index) for number in sorted(steps) for index in range(1, number)]
        self.rows = {step: row for row, step in enumerate(later, start=1)}
        self.row = 0
        places = {
            name: module
            for name, module in roles.fake.named_modules()
            if isinstance(module, TimestepEmbedding) and name.rpartition(".")[2].startswith("time")
        }
        if not places:
            raise ValueError(
                f"{type(roles.fake).__name__} has no time embedding to tell the step; drop step_aware_fake"
            )
        widths = [module.linear_2.out_features for module in places.values()]
        tables = [nn.Embedding(len(later) + 1, width).to(device()) for width in widths]
        for table, module in zip(tables, places.values(), strict=True):
            nn.init.zeros_(table.weight)
            module.register_forward_hook(self._adder(table))
        self.memory = nn.ModuleList(tables)

    def attend(self, rollout: Rollout) -> None:
        self.row = self.rows.get((rollout.steps, rollout.index), 0)

    def _adder(self, table: nn.Embedding) -> Any:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + table.weight[self.row].to(output.dtype)

        return add
