"""Gradients of several ranks: their mean, in buckets, and one norm over shards and whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.parallel.gradients import average, buckets, clip
from distill.parallel.options import Parallel
from distill.parallel.shard import full, mesh_of, shard
from distill.parallel.world import world


def test_buckets_hold_one_dtype_and_no_more_than_their_size() -> None:
    gradients = [torch.zeros(10), torch.zeros(10), torch.zeros(10), torch.zeros(4).double(), torch.zeros(1000)]
    found = list(buckets(gradients, size=80))
    assert [[len(g) for g in bucket] for bucket in found] == [[10, 10], [10], [4], [1000]]
    assert list(buckets([])) == []


def test_gradients_are_averaged_and_clipped_over_ranks(ranks: Any) -> None:
    for means, shares, norm, clipped in ranks(2, gradients_of_two):
        assert means == [1.5, 15.0]  # of 1 and 2, and of 10 and 20
        expected = 3.0**0.5 * 1.5, (3 * 1.5**2 + 6 * 1.0**2) ** 0.5
        torch.testing.assert_close(norm, expected[1])
        torch.testing.assert_close(clipped, 0.5, rtol=1e-5, atol=0)
        assert shares == 1.0


def gradients_of_two() -> tuple[list[float], float, float, float]:
    here = world()
    whole = nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    for factor, parameter in zip((1.0, 10.0), whole, strict=True):
        parameter.grad = torch.full_like(parameter, factor * (here.rank + 1))
    average(whole, here)
    means = [float(p.grad.mean()) for p in whole]
    network = nn.Linear(2, 3, bias=False)
    shard(network, (), mesh_of(Parallel(strategy="fsdp"), here.size), "float32")
    network(torch.ones(1, 2)).sum().backward()
    shares = float(full(network.weight.grad).mean())
    together = [*network.parameters(), whole[0]]
    norm = float(clip(together, 0.5))
    return means, shares, norm, norm_of([full(p.grad) for p in together])


def norm_of(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())
