"""Rows of forward passes by role."""

from __future__ import annotations

import copy

import torch
from torch import nn

from distill.telemetry.counters import Passes


class Named(nn.Module):
    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


def test_rows_are_counted_by_network_until_they_are_taken() -> None:
    a, b = nn.Linear(2, 2), Named()
    passes = Passes({"a": a, "b": b})
    a(torch.zeros(3, 2))
    a(torch.zeros(4, 2))
    b(scale=2.0, x=torch.zeros(5, 1))
    passes.count("reward", 6)
    assert passes.take() == {"forwards/a": 7, "forwards/b": 5, "forwards/reward": 6}
    assert passes.take() == {}


def test_a_network_that_stands_in_for_another_is_counted_as_it() -> None:
    a = nn.Linear(2, 2)
    stand_in, passes = copy.deepcopy(a), Passes({"a": a})
    passes.watch("a", stand_in)
    a(torch.zeros(3, 2))
    stand_in(torch.zeros(4, 2))
    assert passes.take() == {"forwards/a": 7}


def test_probes_and_copies_that_average_weights_do_not_disturb_the_count() -> None:
    a = nn.Linear(2, 2)
    passes = Passes({"a": a})
    average = copy.deepcopy(a)
    with passes.uncounted():
        a(torch.zeros(3, 2))
        passes.count("reward", 3)
    assert passes.take() == {}
    a(torch.zeros(1, 2))
    assert passes.take() == {"forwards/a": 1}
    assert list(average.state_dict()) == list(a.state_dict())
