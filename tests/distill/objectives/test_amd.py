"""AMD's options and Re-DMD's weight against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.math import group_advantage, squash
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening, RewardWeight
from distill.objectives.plan import Rollout

ADVANTAGE = torch.tensor([-4.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 3.0])
ROLLOUT = Rollout(torch.zeros(8, 1), {}, (), 1, 0, advantage=lambda: ADVANTAGE)
T = torch.zeros(8, dtype=torch.float64)
NONE: Any = None


@pytest.mark.parametrize(("bound", "expected"), [(1.0, [-1, -1, -0.5, 0, 0.25, 1, 1, 1]), (2.0, None)])
def test_clipped_advantages_stay_in_their_bounds(bound: float, expected: list[float] | None) -> None:
    found = squash(ADVANTAGE, "clip", bound)
    torch.testing.assert_close(found, torch.tensor(expected) if expected else ADVANTAGE.clamp(-2, 2))


def test_tanh_keeps_the_order_that_a_clip_loses() -> None:
    soft, hard = squash(ADVANTAGE, "tanh"), squash(ADVANTAGE)
    assert bool((soft[1:] > soft[:-1]).all()) and not bool((hard[1:] > hard[:-1]).all())
    torch.testing.assert_close(squash(ADVANTAGE, "tanh", 2.0), 2.0 * torch.tanh(ADVANTAGE / 2))
    assert float(soft.abs().max()) < 1 and float(soft[3]) == 0.0


def test_an_unknown_squash_is_refused() -> None:
    with pytest.raises(ValueError, match="squash is 'soft'; use clip or tanh"):
        squash(ADVANTAGE, "soft")


@pytest.mark.parametrize("kind", ["clip", "tanh"])
def test_adaptation_weighs_by_its_squashed_advantage(kind: str) -> None:
    squashed = partial(squash, kind=kind, bound=2.0)
    alpha, beta = DynamicScoreAdaptation(0.3, squash=squashed).student_weights(ROLLOUT, NONE)
    expected = 0.3 * squash(ADVANTAGE, kind, 2.0)
    torch.testing.assert_close(alpha, 1 + expected)
    torch.testing.assert_close(beta, 1 - expected)
    assert float(beta[0]) > 1 > float(alpha[0])  # the poorest sample is matched more and guided less


def test_sharpening_reads_the_raw_or_the_squashed_advantage() -> None:
    raw = RepulsiveSharpening(clipped=False).fake_weight(ROLLOUT, T)
    torch.testing.assert_close(raw, torch.exp(-ADVANTAGE))
    soft = RepulsiveSharpening(squash=partial(squash, kind="tanh")).fake_weight(ROLLOUT, T)
    torch.testing.assert_close(soft, torch.exp(-torch.tanh(ADVANTAGE)))
    scaled = RepulsiveSharpening(group=4).fake_weight(ROLLOUT, T).reshape(2, 4)
    torch.testing.assert_close(scaled.mean(1), torch.ones(2))
    torch.testing.assert_close(scaled[0] / scaled[0, 3], torch.exp(-ADVANTAGE[:4].clamp(-1, 1)))


def test_trust_shrinks_the_strength_and_the_exponent() -> None:
    doubted = replace(ROLLOUT, trust=0.25)
    full = DynamicScoreAdaptation(0.1).student_weights(ROLLOUT, NONE)
    assert torch.equal(DynamicScoreAdaptation(0.4).student_weights(doubted, NONE)[0], full[0])
    none = replace(ROLLOUT, trust=0.0)
    assert torch.equal(DynamicScoreAdaptation(0.4).student_weights(none, NONE)[1], torch.ones(8))
    assert torch.equal(RepulsiveSharpening(group=4).fake_weight(none, T), torch.ones(8))
    weight = RepulsiveSharpening(clipped=False).fake_weight(doubted, T)
    torch.testing.assert_close(weight, torch.exp(-0.25 * ADVANTAGE))


@pytest.mark.parametrize("group", [2, 4])
def test_leave_one_out_compares_with_the_others(group: int) -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 9.0, -1.0, 0.0, 0.5, 7.0])
    found = group_advantage(rewards, group, leave_one_out=True)
    grouped = rewards.reshape(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    expected = (grouped - others) / (grouped.std(1, unbiased=False, keepdim=True) + 1e-6)
    torch.testing.assert_close(found, expected.flatten())
    assert group_advantage(torch.full((8,), 3.3), group, leave_one_out=True).abs().max() == 0


def rewarded(rewards: Tensor) -> Rollout:
    return Rollout(torch.zeros(len(rewards), 1), {}, (), 1, 0, rewards=lambda: rewards)


def test_reward_weight_is_the_exponential_of_the_standardised_reward() -> None:
    rewards = torch.tensor([20.0, 22.0, 26.0, torch.nan])
    alpha, beta = RewardWeight(2.0, centre=22.0, scale=4.0).student_weights(rewarded(rewards), NONE)
    torch.testing.assert_close(alpha, torch.tensor([math.exp(-1.0), 1.0, math.exp(2.0), 1.0]))
    assert torch.equal(alpha, beta)
    bounded, _ = RewardWeight(2.0, centre=22.0, scale=4.0, bound=0.75).student_weights(rewarded(rewards), NONE)
    torch.testing.assert_close(bounded, torch.tensor([math.exp(-1.0), 1.0, math.exp(1.5), 1.0]))
    assert torch.equal(RewardWeight(0.0).student_weights(rewarded(rewards), NONE)[0], torch.ones(4))


def test_reward_weight_and_amd_treat_poor_samples_in_opposite_ways() -> None:
    rewards = torch.tensor([-1.0, 1.0])
    rollout = replace(rewarded(rewards), advantage=lambda: group_advantage(rewards, 2))
    assert float(RewardWeight(1.0).student_weights(rollout, NONE)[1][0]) < 1
    assert float(DynamicScoreAdaptation(0.5).student_weights(rollout, NONE)[1][0]) > 1
