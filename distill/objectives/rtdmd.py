"""RTDMD (arXiv 2605.26108): match the teacher tilted by a reward, p̃ ∝ p·e^{βr}.

As one displacement with the reward's gradient (RewardTilt), or in the paper's own parts: a fake score that agrees with
itself (ScoreConsistency) and a policy gradient on the stochastic steps (PolicyGradient); the reward's gradient on the
last step is DMDR's (distill.objectives.dmdr).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.families.base import coefficients
from distill.math import add_noise, expand, group_advantage
from distill.objectives.dmdr import reward_of
from distill.objectives.plan import Hook, Matching, Roles, Rollout, Terms, time_at
from distill.parallel.device import normal, uniform
from distill.rewards.latent import scores_of
from distill.tasks.common import to_uint8


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


class ScoreConsistency(Hook):
    """λ·E[⟨h(x_s) − h(x_t), h(x_s') − h(x_t)⟩] on the fake score's clean estimate h.

    x_s and x_s' are two independent steps back from x_t. The denoisers of a density, of any one, are martingales of
    its reverse process, E[h(x_s) | x_t] = h(x_t), and nothing else is: the loss ties the noise levels together, so that
    what segments of time teach apart becomes one density; which one is left to the denoising loss (consistent diffusion
    models, Daras et al., arXiv 2302.09057). Independence makes the product an unbiased squared difference.

    λ = 0.01, steps of up to 0.2 of the axis without a gradient through them, and the product are the reference code's
    (high confidence). It steps by re-noising h with nearly fresh noise (η = 0.9), which is no step of the reverse
    process and leaves a loss where all is well; here x_s ∼ q(x_s | x_t, x0 = h(x_t)), with the right mean for any data.
    """

    terms = Terms(extra="fake: h(x_t) = E h(x_s)")

    def __init__(self, roles: Roles, *, weight: float, span: float = 0.2) -> None:
        self.roles, self.weight, self.span = roles, weight, span

    def extra_fake_loss(self, rollout: Rollout) -> Tensor:
        family, x, rng = self.roles.family, rollout.samples, rollout.random("martingale")
        u, back = (uniform(len(x), rng, x.device) for _ in range(2))
        t, s = (time_at(family.schedule, f) for f in (u, (u - self.span * back).clamp_min(0.0)))
        x_t = add_noise(x, normal(x.shape, rng, x.device), *coefficients(family.schedule, t))
        h = family.predict(self.roles.fake, x_t, t, rollout.condition).x0
        steps = [self._back(x_t, h.detach(), t, s, normal(x.shape, rng, x.device)) for _ in range(2)]
        first, second = (family.predict(self.roles.fake, x_s, s, rollout.condition).x0 - h for x_s in steps)
        loss: Tensor = (first * second).flatten(1).mean()
        rollout.telemetry["consistency"] = loss.detach()
        return self.weight * loss

    def _back(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s ∼ q(x_s | x_t, x0) = N(α_s·x0 + ρ·(σ_s/σ_t)²·(x_t − α_t·x0), σ_s²·(1 − (ρ·σ_s/σ_t)²)), ρ = α_t/α_s."""
        (a_t, s_t), (a_s, s_s) = (coefficients(self.roles.family.schedule, time) for time in (t, s))
        rho, ratio = a_t / a_s.clamp_min(1e-12), s_s / s_t.clamp_min(1e-12)
        pull, spread = rho * ratio**2, s_s * (1 - (rho * ratio) ** 2).clamp_min(0).sqrt()
        c_s, c_t, pull, spread = (expand(c, x_t).to(x_t) for c in (a_s, a_t, pull, spread))
        return c_s * x0 + pull * (x_t - c_t * x0) + spread * noise


class PolicyGradient(Hook):
    """SubGRPO: −λ·mean a_i·log p_θ(x_{k+1} | x_k), a_i the group advantage of the reward at the end of the roll-out.

    The student's stochastic step is a Gaussian policy, x_{k+1} = α·x̂_θ(x_k) + σ·ε. From there the present student goes
    to the end without a graph, with noise that a group shares, so that a_i owes less to it (the paper's "sub").
    log p = −mean‖x_{k+1} − α·x̂_θ‖², without the constant 1/(2σ²), |a| ≤ 5 and one update per roll-out, in which the
    clipped ratio of GRPO is 1 and its gradient this one, are the reference code's (high confidence; its η = 0.9 keeps
    some of the old noise, our sampler none). The reward is scored, never differentiated, so any judge will do. Nothing
    happens on a grid's last step, which has no noise. DMDR names GRPO as a variant of its reward term; its public code
    has the reward's gradient alone, so this serves both.
    """

    terms = Terms(extra="−λ·a·log p(x_{k+1})")

    def __init__(self, roles: Roles, reward: Any, *, weight: float, group: int, bound: float = 5.0) -> None:
        self.roles, self.reward, self.weight, self.group, self.bound = roles, reward, weight, group, bound

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        if rollout.index + 1 == rollout.steps:
            return None
        schedule, n = self.roles.family.schedule, len(rollout.x)
        place = rollout.x.device
        grid = [torch.full((n,), float(t), dtype=torch.float64, device=place) for t in schedule.grid(rollout.steps)]
        following, rng = grid[rollout.index + 1 :], rollout.random("policy")
        alpha, sigma = (expand(c, rollout.x).float() for c in coefficients(schedule, following[0]))
        mean = alpha * rollout.x.float()
        reached = mean.detach() + sigma * normal(mean.shape, rng, place)
        advantage = self._advantage(self._end(reached, following, rollout, rng), rollout)
        log_p = -(reached - mean).pow(2).flatten(1).mean(1)
        rollout.telemetry["policy_advantage"] = advantage.abs().mean()
        return -self.weight * (advantage * log_p).mean()

    @torch.no_grad()
    def _end(self, x: Tensor, times: Sequence[Tensor], rollout: Rollout, rng: torch.Generator) -> Tensor:
        """The clean sample to which the student goes from x at times[0], every fresh noise shared by a group."""
        family, x0 = self.roles.family, x
        for t, t_next in zip(times, (*times[1:], None), strict=True):
            x0 = family.predict(self.roles.student, x, t, rollout.condition).x0
            if t_next is not None:
                noise = normal((len(x) // self.group, *x.shape[1:]), rng, x.device)
                x = add_noise(x0, noise.repeat_interleave(self.group, 0), *coefficients(family.schedule, t_next))
        return x0

    @torch.no_grad()
    def _advantage(self, x: Tensor, rollout: Rollout) -> Tensor:
        """(B,) in [−bound, bound]; 0 for a reward that is not finite, which counts as its group's mean."""
        with torch.autocast(x.device.type, enabled=False):
            decode = self.roles.family.decode
            (rewards,) = scores_of([self.reward], x.float(), rollout.prompts, lambda latents: to_uint8(decode(latents)))
        finite = rewards.isfinite()
        grouped = torch.where(finite, rewards, torch.nan).reshape(-1, self.group)
        filled = torch.where(grouped.isfinite(), grouped, grouped.nanmean(1, keepdim=True)).flatten()
        return torch.where(finite, group_advantage(filled, self.group), 0.0).clamp(-self.bound, self.bound)
