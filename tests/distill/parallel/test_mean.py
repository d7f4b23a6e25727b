"""Averages of weights: followed, swapped, tied weights once."""

from __future__ import annotations

import torch
from torch import nn

from distill.parallel.mean import Average


def module() -> nn.Module:
    made = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)])
    made[1].weight = made[0].weight
    return made


def test_weights_are_averaged_and_buffers_copied() -> None:
    network = module()
    nn.init.constant_(network[0].weight, 1.0)
    average = Average(network)
    nn.init.constant_(network[0].weight, 3.0)
    network[2].num_batches_tracked += 5
    average.follow(0.75)
    assert average.state_dict()["0.weight"].eq(1.5).all()
    assert average.state_dict()["2.num_batches_tracked"] == 5
    assert network[0].weight.eq(3.0).all()


def test_swapping_twice_changes_nothing_and_tied_weights_are_kept_once() -> None:
    network = module()
    nn.init.constant_(network[0].weight, 1.0)
    average = Average(network)
    nn.init.constant_(network[0].weight, 3.0)
    average.swap()
    assert network[1].weight.eq(1.0).all() and average.state_dict()["0.weight"].eq(3.0).all()
    average.swap()
    assert network[1].weight.eq(3.0).all() and average.state_dict()["0.weight"].eq(1.0).all()
    state = average.state_dict()
    assert set(state) == set(network.state_dict())
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_an_average_has_no_graph() -> None:
    average = Average(module())
    assert not any(t.requires_grad for t in average.state_dict().values())
    assert all(t.dtype == torch.float32 for n, t in average.state_dict().items() if n.endswith("weight"))
