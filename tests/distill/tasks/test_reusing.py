"""Kept advantages: by micro-batch, of all ranks, and only where they are of the right iteration and split."""

from __future__ import annotations

import pytest
import torch

from distill.config import RecipeError
from distill.parallel.world import World
from distill.tasks.reusing import ROOM, KeptAdvantages
from tests.distill.tasks.test_gathering import Second

HALVES = {1: torch.tensor([3.0, 4.0]), 0: torch.tensor([1.0, 2.0])}


def test_nothing_is_kept_at_first() -> None:
    assert KeptAdvantages(8).of(0, 0, 1, 8).tolist() == [0.0] * 8


def test_micro_batches_are_kept_in_their_order() -> None:
    kept = KeptAdvantages(4)
    kept.keep(5, HALVES, World())
    assert [kept.of(5, micro, 2, 2).tolist() for micro in (0, 1)] == [[1.0, 2.0], [3.0, 4.0]]
    kept.of(5, 0, 2, 2).zero_()  # nobody's own
    assert kept.of(5, 0, 2, 2).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("asked", [(4, 0, 2, 2), (5, 0, 1, 4), (5, 0, 4, 2), (5, 0, 4, 1), (5, 0, 2, 4)])
def test_what_is_of_another_iteration_or_split_counts_as_none(asked: tuple[int, int, int, int]) -> None:
    kept = KeptAdvantages(4)
    kept.keep(5, HALVES, World())
    assert kept.of(*asked).tolist() == [0.0] * asked[-1]


def test_every_rank_keeps_those_of_all() -> None:
    told = [{1: HALVES[1]}]
    kept = KeptAdvantages(4)
    kept.keep(5, {0: HALVES[0]}, Second(1, 2, None, told))
    assert [kept.of(5, micro, 2, 2).tolist() for micro in (0, 1)] == [[1.0, 2.0], [3.0, 4.0]]


def test_a_state_fits_any_batch_and_a_larger_one_is_refused() -> None:
    small, large = KeptAdvantages(4), KeptAdvantages(ROOM)
    small.keep(5, HALVES, World())
    large.load_state_dict(small.state_dict())
    assert large.of(5, 1, 2, 2).tolist() == [3.0, 4.0]
    with pytest.raises(RecipeError, match=rf"batch_size is {ROOM + 1} and advantage.when reuse keeps at most {ROOM}"):
        KeptAdvantages(ROOM + 1)
