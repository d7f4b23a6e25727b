"""The shrunk deviation against its formula in float64, its memory, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.math import adaptive_weights, group_advantage, squash
from distill.objectives.deviation import ShrunkDeviation, group_variance
from distill.objectives.plan import Rollout

FIRST = torch.tensor([1.0, 2.0, 4.0, 9.0, -1.0, 0.0, 0.5, 7.0])
SECOND = torch.tensor([0.10, 0.11, 0.10, 0.12, 3.0, -2.0, 5.0, 1.0])


def scored(rewards: Tensor) -> Rollout:
    return Rollout(torch.zeros(len(rewards), 1), {}, (), 1, 0, rewards=lambda: rewards)


def hook_of(shrinkage: float, floor: float = 0.0, decay: float = 0.9) -> ShrunkDeviation:
    return ShrunkDeviation(group=4, shrinkage=shrinkage, decay=decay, floor=floor)


@pytest.mark.parametrize(("shrinkage", "floor"), [(0.0, 0.0), (0.3, 0.0), (0.7, 2.5), (1.0, 0.0)])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_advantages_are_those_of_the_shrunk_deviation(shrinkage: float, floor: float, leave_one_out: bool) -> None:
    hook = hook_of(shrinkage, floor)
    for rewards in (FIRST, FIRST + 1, SECOND * 2):
        hook.after_iteration([scored(rewards)])
    raw = group_advantage(SECOND, 4, sigma_floor=floor, leave_one_out=leave_one_out)
    found = hook.judge(scored(SECOND), raw)

    r = SECOND.double().numpy().reshape(2, 4)
    seen = [x.double().numpy().reshape(2, 4).var(1).mean() for x in (FIRST, FIRST + 1, SECOND * 2)]
    weights = np.array([0.9**2, 0.9, 1.0])
    running = (weights * seen).sum() / weights.sum()
    sigma = np.sqrt((1 - shrinkage) * r.var(1) + shrinkage * running).clip(floor)[:, None]
    expected = (r - r.mean(1, keepdims=True)) / (sigma + 1e-6) * (4 / 3 if leave_one_out else 1)
    np.testing.assert_allclose(found.numpy(), expected.flatten(), rtol=2e-5)


def test_before_anything_was_seen_the_group_stands_alone() -> None:
    raw = group_advantage(SECOND, 4)
    assert torch.equal(hook_of(0.5).judge(scored(SECOND), raw), raw)


def test_a_group_that_agrees_by_chance_does_not_get_the_whole_weight() -> None:
    """Rewards that differ by a hundredth where they usually differ by three: ã = ±1 without, nearly 0 with."""
    hook = hook_of(0.5)
    hook.after_iteration([scored(FIRST)])
    raw = group_advantage(SECOND, 4)
    for advantage, least, most in ((raw, 0.08, 0.11), (hook.judge(scored(SECOND), raw), 0.0, 0.001)):
        alpha, _ = adaptive_weights(squash(advantage), 0.1)
        assert least <= float((alpha[:4] - 1).abs().max()) <= most


def test_rewards_that_are_not_finite_stand_at_their_groups_mean() -> None:
    rewards = torch.tensor([1.0, torch.nan, 3.0, 5.0, torch.nan, torch.nan, torch.nan, torch.nan])
    variance = group_variance(rewards, 4)
    assert float(variance[0]) == pytest.approx(np.var([1.0, 3.0, 3.0, 5.0])) and bool(variance[1].isnan())
    hook = hook_of(0.5)
    hook.after_iteration([scored(rewards)])
    running = hook.memory.get_buffer("variance") / hook.memory.get_buffer("seen")
    assert float(running) == pytest.approx(2.0)
    raw = torch.where(rewards.isfinite(), 0.5, 0.0)
    assert bool(hook.judge(scored(rewards), raw).isfinite().all())
    hook.after_iteration([scored(torch.full((8,), torch.nan))])
    assert float(hook.memory.get_buffer("variance") / hook.memory.get_buffer("seen")) == pytest.approx(2.0)


def test_micro_batches_teach_what_the_batch_teaches() -> None:
    whole, parts = hook_of(0.5), hook_of(0.5)
    whole.after_iteration([scored(FIRST)])
    parts.after_iteration([scored(FIRST[:4]), scored(FIRST[4:])])
    for a, b in zip(whole.memory.buffers(), parts.memory.buffers(), strict=True):
        torch.testing.assert_close(a, b)
