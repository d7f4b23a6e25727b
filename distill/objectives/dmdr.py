"""DMDR (arXiv 2511.13649): a reward's gradient beside distribution matching, and noise levels that move in training.

Its third part, dynamic distribution guidance, is distill.objectives.weak_to_strong.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from scipy.special import betaincinv  # type: ignore[import-untyped]
from torch import Tensor

from distill.objectives.plan import Hook, Part, Roles, Rollout, Terms, routed
from distill.rewards.latent import LatentReward


class RewardGradient(Hook):
    """ReFL: L = L_DMD − λ·mean r(decode(x)), the gradient through decoder and reward, from iteration ``start`` on.

    λ = 0.05 with r the log-probability of the class under DINOv2 (reference script, high confidence), after 20,000
    iterations without. Pixels are clipped to the picture's range as in the reference, in float32. Rewards that are not
    finite, and gradients that are not, count as zero. The reward's graph is freed before the student's is walked.
    """

    terms = Terms(extra="−λ·r, differentiated")

    def __init__(self, roles: Roles, reward: Any, *, weight: float, start: int = 0) -> None:
        self.roles, self.reward, self.weight, self.start = roles, reward, weight, start

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        if rollout.iteration < self.start:
            return None
        leaf = rollout.samples.float().requires_grad_()
        loss = -self.weight * reward_of(self.roles.family, self.reward, leaf, rollout).mean()
        return routed(loss, [leaf], [rollout.x])


def reward_of(family: Any, reward: Any, x: Tensor, rollout: Rollout) -> Tensor:
    """r(decode(x)) with a graph, or r(x) of a reward of latents, (B,); zero where it is not finite."""
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(reward, LatentReward):
            scores = reward.score_latents(x, rollout.prompts)
        else:
            scores = reward.score_pixels(family.decode(x).clamp(-1.0, 1.0), rollout.prompts)
        return torch.nan_to_num(scores.float(), 0.0, 0.0, 0.0)


class BetaRenoising(Hook):
    """DynaRS: τ ∼ Beta(a, b) for matching and for the fake score, annealed to uniform: high noise first.

    a, b = 1 + (4 − 1)·γ, 1 + (1.5 − 1)·γ with γ = ½(1 + cos(π·i/anneal)), anneal = 10,000 (reference code, high
    confidence). There τ covers (0, 1); here it is scaled into the recipe's time_range.
    """

    terms = Terms(times="Beta(a, b), annealed to uniform")

    def __init__(self, *, a: float, b: float, anneal: int) -> None:
        self.a, self.b, self.anneal = a, b, anneal

    def times(self, rollout: Rollout, part: Part, rng: torch.Generator, low: float, high: float) -> Tensor | None:
        if part == "ca":
            return None
        gamma = 0.5 * (1 + cos(pi * min(1.0, rollout.iteration / self.anneal)))
        u = torch.rand(len(rollout.x), generator=rng, dtype=torch.float64)
        a, b = 1 + (self.a - 1) * gamma, 1 + (self.b - 1) * gamma
        return low + (high - low) * torch.from_numpy(betaincinv(a, b, u.numpy()))
