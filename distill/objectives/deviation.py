"""The deviation in a group advantage, steadied by what it has been: a group of four says little of its own σ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.objectives.plan import Hook, Rollout, buffers

_EPS = 1e-6
"""That of distill.math.group_advantage."""


class ShrunkDeviation(Hook):
    """σ² = (1 − λ)·σ_g² + λ·σ_ema² in the place of σ_g² in a = (r − μ_g)/(σ + ε), then the floor.

    σ_ema² is the running mean of the groups' variances, without the bias of its start; before a first one is known, σ_g
    stands alone. The paper has the group's own deviation, with which a group whose rewards agree by chance gets the
    weights ±s at once; λ shrinks it as James and Stein do a mean (ours). Advantages of a group keep their order.
    """

    memory: nn.Module

    def __init__(self, *, group: int, shrinkage: float, decay: float, floor: float = 0.0) -> None:
        self.group, self.shrinkage, self.decay, self.floor = group, shrinkage, decay, floor
        self.memory = buffers(variance=torch.zeros(1, dtype=torch.float64), seen=torch.zeros(1, dtype=torch.float64))

    def judge(self, rollout: Rollout, advantage: Tensor) -> Tensor:
        variance, seen = self.memory.get_buffer("variance"), self.memory.get_buffer("seen")
        if float(seen) == 0.0:
            return advantage
        own = group_variance(rollout.rewards(), self.group)
        shrunk = (1 - self.shrinkage) * own + self.shrinkage * float(variance) / float(seen)
        old, new = (v.sqrt().clamp_min(self.floor) + _EPS for v in (own, shrunk))
        factor = (old / new).nan_to_num(1.0).repeat_interleave(self.group)
        rollout.telemetry["sigma_running"] = float((variance / seen).sqrt())
        return (advantage.double() * factor).to(advantage)

    @torch.no_grad()
    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        found = torch.cat([group_variance(r.rewards(), self.group) for r in rollouts]).cpu()
        found = found[found.isfinite()]
        if len(found):
            self.memory.get_buffer("variance").lerp_(found.mean().reshape(1), 1 - self.decay)
            seen = self.memory.get_buffer("seen")
            seen.lerp_(torch.ones_like(seen), 1 - self.decay)


def group_variance(rewards: Tensor, group: int) -> Tensor:
    """Variances as advantages see them: a reward that is not finite stands at its group's mean.

    rewards: (B,) in consecutive groups. Returns (B / group,) float64, NaN for a group without any reward.
    """
    grouped = rewards.double().reshape(-1, group)
    return torch.where(grouped.isfinite(), grouped, grouped.nanmean(1, keepdim=True)).var(1, unbiased=False)
