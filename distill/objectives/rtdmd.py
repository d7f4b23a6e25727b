"""RTDMD (arXiv 2605.26108): match the teacher tilted by a reward, p̃ ∝ p·e^{βr}, with the reward's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.families.base import coefficients
from distill.math import expand
from distill.objectives.dmdr import reward_of
from distill.objectives.plan import Hook, Matching, Roles, Rollout, Terms


class RewardTilt(Hook):
    """H ← H + β·v_t·∇_x r(x): the displacement towards the clean estimate of the tilted teacher.

    The paper states ∇KL(p_θ‖p̃) = ∇KL(p_θ‖p) − β·∇E[r] (quoted, high confidence) and realises it with policy gradients
    and a small loss on the reward; as one displacement it is ours. At x_t the tilted teacher's clean estimate is, to
    first order, x̂ + β·Cov[x|x_t]·∇r, and v_t = s²σ_t²/(α_t²s² + σ_t²) is that covariance for data of deviation s per
    dimension. For Gaussian data and a linear reward it is exact, and the fixed point is p·e^{βr}: what AMD's sharpening
    reaches without a gradient, with β one over the deviation of r.
    """

    terms = Terms(extra="H + β_r·v_t·∇r")

    def __init__(self, roles: Roles, reward: Any, *, beta: float, deviation: float = 1.0) -> None:
        self.roles, self.reward, self.beta, self.variance = roles, reward, beta, deviation**2

    def displacement(self, rollout: Rollout, matching: Matching) -> Tensor:
        alpha, sigma = coefficients(self.roles.family.schedule, matching.t)
        posterior = self.variance * sigma**2 / (alpha**2 * self.variance + sigma**2)
        with torch.enable_grad():
            leaf = rollout.samples.float().requires_grad_()
            total = reward_of(self.roles.family, self.reward, leaf, rollout).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        rollout.telemetry["tilt_norm"] = gradient.flatten(1).norm(dim=1).mean()
        return self.beta * expand(posterior, leaf).to(leaf) * gradient.nan_to_num(0.0, 0.0, 0.0)
