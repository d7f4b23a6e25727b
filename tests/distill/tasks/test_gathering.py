"""Rollouts of all ranks: in the order of micro-batches, with all that hooks look at, and only if one looks."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from distill.objectives.plan import Hook, Rollout
from distill.parallel.world import World
from distill.tasks.gathering import everyones


class Looking(Hook):
    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        """Looks."""


@dataclass(frozen=True)
class Second(World):
    """The second of two ranks; what the first said travels as it would."""

    said: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.said.append(value)
        return list(pickle.loads(pickle.dumps(self.said)))


def rollout(value: float, rewarded: bool) -> Rollout:
    made = Rollout(torch.full((2, 1), value, requires_grad=True) * 1.0, {}, ["a", "b"], 4, 2, iteration=7)
    if rewarded:
        made.rewards = lambda: torch.tensor([value, -value])
    made.heldout, made.cache = {"judge": torch.tensor([value, value])}, {"kept": (torch.tensor(value),)}
    return made


@pytest.mark.parametrize("rewarded", [True, False])
def test_hooks_see_the_rollouts_of_all_ranks_in_order(rewarded: bool) -> None:
    world = Second(rank=1, size=2)
    everyones({0: rollout(0.0, rewarded), 4: rollout(4.0, rewarded)}, [Looking()], world)
    seen = everyones({1: rollout(1.0, rewarded), 5: rollout(5.0, rewarded)}, [Hook(), Looking()], world)
    assert [float(r.samples[0, 0]) for r in seen] == [0.0, 1.0, 4.0, 5.0]
    assert all(not r.x.requires_grad and (r.steps, r.index, r.iteration) == (4, 2, 7) for r in seen)
    assert [float(r.cache["kept"][0]) for r in seen] == [0.0, 1.0, 4.0, 5.0]
    assert [float(r.heldout["judge"][1]) for r in seen] == [0.0, 1.0, 4.0, 5.0]
    if rewarded:
        assert [float(r.rewards()[1]) for r in seen] == [0.0, -1.0, -4.0, -5.0]
    else:
        with pytest.raises(ValueError, match="no reward"):
            seen[0].rewards()


def test_nothing_travels_if_no_hook_looks_or_there_is_one_rank() -> None:
    world, mine = Second(rank=1, size=2), {3: rollout(3.0, True), 1: rollout(1.0, True)}
    assert everyones(mine, [Hook()], world) == [mine[1], mine[3]] and not world.said
    assert everyones(mine, [Looking()], World()) == [mine[1], mine[3]]
