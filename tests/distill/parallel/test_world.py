"""Who does what: micro-batches, agreement, and recipes that cannot be shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from distill.config import RecipeError, parse_recipe
from distill.parallel.options import Parallel
from distill.parallel.shard import mesh_of
from distill.parallel.world import World, world

TREE = {
    "task": "distill", "name": "toy", "output": "out", "teacher": "models/toy", "iterations": 1, "batch_size": 8,
    "accumulate": 4, "student": {"learning_rate": 1e-4}, "fake": {"learning_rate": 1e-4}, "data": "digits",
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_share_the_micro_batches_in_order(size: int) -> None:
    shares = [World(rank, size).micros(6) for rank in range(size)]
    assert [micro for share in shares for micro in share] == list(range(6))
    assert {len(share) for share in shares} == {6 // size}


def test_micro_batches_that_cannot_be_shared_are_refused_with_the_next_number_that_can() -> None:
    with pytest.raises(ValueError, match=r"accumulate is 6, .* there are 4 ranks; use a multiple of 4, .*accumulate=8"):
        World(0, 4).micros(6)


def test_ranks_that_share_a_sequence_share_their_micro_batches() -> None:
    shares = [World(rank, 6).micros(6, context=2) for rank in range(6)]
    assert shares == [range(0, 2), range(0, 2), range(2, 4), range(2, 4), range(4, 6), range(4, 6)]
    with pytest.raises(ValueError, match=r"parallel.context is 4 for 6 ranks; use a divisor of 6"):
        World(0, 6).micros(6, context=4)
    with pytest.raises(ValueError, match=r"there are 3 groups of 2 ranks; use a multiple of 3, such as accumulate=6"):
        World(0, 6).micros(4, context=2)


def test_one_process_is_a_world_of_one_that_talks_to_nobody() -> None:
    assert world() == World(0, 1) and not dist.is_initialized()
    alone = World()
    assert alone.leader and alone.gather("x") == ["x"] and alone.most(3) == 3
    alone.barrier()


def test_ranks_agree(ranks: Any) -> None:
    told = ranks(3, agreement)
    assert told == [([0, 10, 20], 20, "parallel.replicas is 2 for 3 ranks; use a divisor of 3")] * 3


def agreement() -> tuple[list[int], int, str]:
    here = world()
    mine = 10 * here.rank
    try:
        mesh_of(Parallel(strategy="hsdp", replicas=2), here.size)
    except ValueError as error:
        return here.gather(mine), here.most(mine), str(error).partition(", such")[0]
    raise AssertionError("three ranks are no two groups")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"replicas": 2}}, "replicas is 2 under strategy ddp; use strategy: hsdp"),
        ({"parallel": {"strategy": "fsdp"}, "gan": {"r1": 1.0}}, "gan.r1_form exact needs a second backward pass"),
        ({"parallel": {"context": 2}, "gan": {"r1": 1.0}}, "second backward pass; use finite, or ddp without context"),
        ({"adapters": {"base": "bfloat16"}}, "adapters.base bfloat16 computes in bfloat16; use precision: bfloat16"),
        ({"adapters": {}, "step_aware_fake": True}, "step_aware_fake needs a fake score with a network of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_the_recipe(changes: dict[str, Any], message: str) -> None:
    parse_recipe(TREE)
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**TREE, **changes})
