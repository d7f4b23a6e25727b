"""Distribution matching in the plane, where every score is exact: the method's proofs in seconds, and its picture.

    python -m distill.toy --out docs/toy.png

The teacher is a Gaussian mixture, the student is a cloud of particles, and the fake score is the exact minimiser of
the fake score's loss on them. Losses and hooks are those of distill.objectives, called as the training task calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.families.base import Condition, Prediction, coefficients
from distill.math import convert, group_advantage
from distill.objectives.dmd import student_loss
from distill.objectives.plan import Hook, Rollout, fake_weight
from distill.sampling import Flow

if TYPE_CHECKING:
    pass

Reward = Callable[[Tensor], Tensor]


class Mixture(nn.Module):
    """Σ_k w_k·N(μ_k, s_k²·1) in the plane, and its denoiser: a teacher, or the fake score of particles (s_k = 0).

    weights, deviations: (K,), means: (K, 2). classes: (K,) int64, the label that each component belongs to, or None
    when there are none; the label ``number of classes`` means all components, the unconditional input.
    """

    def __init__(
        self, weights: Tensor, means: Tensor, deviations: Tensor | float, classes: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weights, self.means = weights / weights.sum(), means
        self.deviations = torch.as_tensor(deviations, dtype=means.dtype).expand(len(weights))
        self.classes = classes

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """E[x | x_t, label] at x_t = α·x + σ·ε.  x_t: (B, 2); α, σ: (B,); labels: (B,). Returns (B, 2).

        Σ_k ρ_k·[μ_k + α·s_k²/V_k·(x_t − α·μ_k)] with V_k = α²s_k² + σ² and ρ_k ∝ w_k·N(x_t; α·μ_k, V_k).
        """
        a, s = alpha.to(x_t)[:, None], sigma.to(x_t)[:, None]
        variance = (a * self.deviations) ** 2 + s**2
        gain = a * self.deviations**2 / variance
        rho = self._log_joint(x_t, a, variance, labels).softmax(1)
        return (rho * (1 - gain * a)) @ self.means + (rho * gain).sum(1, keepdim=True) * x_t

    def log_prob(self, x: Tensor, *, alpha: float = 1.0, sigma: float = 0.0, label: int | None = None) -> Tensor:
        """log p_t of x (…, 2): the density of α·X + σ·ε, with σ = 0 that of X itself. label None: of all components."""
        flat = x.reshape(-1, 2)
        a = torch.full((len(flat), 1), alpha, dtype=x.dtype)
        labels = torch.full((len(flat),), self.unconditional if label is None else label)
        joint = self._log_joint(flat, a, (a * self.deviations) ** 2 + sigma**2, labels)
        chosen = torch.ones_like(self.weights) if label is None or self.classes is None else (self.classes == label)
        return (joint.logsumexp(1) - (self.weights * chosen).sum().log()).reshape(x.shape[:-1])

    @property
    def unconditional(self) -> int:
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def _log_joint(self, x_t: Tensor, a: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        """log w_k·N(x_t; α·μ_k, V_k), (B, K); −∞ for components of other classes."""
        square = x_t.pow(2).sum(1, keepdim=True) - 2 * a * x_t @ self.means.T + a**2 * self.means.pow(2).sum(1)
        joint = self.weights.log() - 0.5 * square / variance - (2 * math.pi * variance).log()
        if self.classes is None:
            return joint
        hidden = (labels[:, None] != self.unconditional) & (labels[:, None] != self.classes)
        return joint.masked_fill(hidden, -math.inf)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, 2)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, 2, generator=rng, dtype=self.means.dtype)
        return self.means[which] + self.deviations[which, None] * noise

    def tilted(self, slope: Tensor) -> Mixture:
        """p(x)·e^{λ·x}/Z: means μ_k + s_k²·λ, weights w_k·exp(λ·μ_k + s_k²|λ|²/2). slope: λ, (2,)."""
        variance = self.deviations**2
        growth = self.means @ slope + 0.5 * variance * slope.square().sum()
        return Mixture(
            self.weights * growth.exp(), self.means + variance[:, None] * slope, self.deviations, self.classes
        )


class Plane:
    """What the objectives read of a family, for the plane: latents (B, 2, 1, 1), labels, flow matching.

    A network is a module (x_t (B, 2), α (B,), σ (B,), labels (B,)) -> E[x | x_t, label], so that it may be exact.
    """

    name, prediction, schedule = "plane", "flow", Flow()

    def __init__(self, unconditional: int = 0) -> None:
        self._unconditional = unconditional

    def predict(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        if taps:
            raise ValueError(f"taps is {tuple(taps)}; a closed form has no features, leave taps empty")
        alpha, sigma = coefficients(self.schedule, t)
        x0 = network(x_t.flatten(1), alpha, sigma, condition["labels"]).reshape(x_t.shape)
        velocity = (x_t - x0) / sigma.to(x_t).reshape(-1, 1, 1, 1)
        return Prediction(*convert(self.prediction, x_t, velocity, alpha, sigma), features={})

    def encode(self, prompts: Sequence[int]) -> Condition:
        return {"labels": torch.as_tensor(list(prompts), dtype=torch.int64)}

    def unconditional(self, n: int) -> Condition:
        return {"labels": torch.full((n,), self._unconditional)}

    def latent_shape(self) -> tuple[int, ...]:
        return (2, 1, 1)


def optimal_fake(rollout: Rollout, hooks: Sequence[Hook] = ()) -> Mixture:
    """The minimiser of fake_loss over all functions, on a finite set of samples with their weights W_i.

    argmin_f Σ_i W_i·E‖f(x_t) − x_i‖² = Σ_i W_i·N(x_t; α·x_i, σ²)·x_i / Σ_i W_i·N(x_t; α·x_i, σ²): the denoiser of the
    points themselves, each as heavy as its weight. As the number of samples grows it becomes the denoiser of
    q ∝ p_θ·W, which is what a fake score with enough capacity learns.
    """
    points = rollout.samples.flatten(1)
    anywhere = torch.full((len(points),), 0.5)  # the hooks used here weigh samples, not times
    return Mixture(fake_weight(hooks, rollout, anywhere).to(points), points, 0.0)


@dataclass(frozen=True)
class Plan:
    """How particles are distilled. step: of x += step·H/n, falls to 0 over the second half when cools.

    draws: independent (t, ε) per particle and iteration. group: particles per advantage, drawn anew each iteration;
    None takes the reward itself for the advantage, whose temperature then is fixed.
    times: range of re-noising, uniform; equal ends mean that time alone. label: the condition, None for none.
    """

    iterations: int = 200
    step: float = 0.05
    cools: bool = True
    draws: int = 1
    group: int | None = 4
    sigma_floor: float = 0.0
    times: tuple[float, float] = (0.02, 0.98)
    guidance: float = 1.0
    label: int | None = None
    seed: int = 0


def distil(
    teacher: Mixture, start: Tensor, plan: Plan, hooks: Sequence[Hook] = (), reward: Reward | None = None
) -> Tensor:
    """Particles (N, 2) under the student's loss with the exact fake score; their path (iterations + 1, N, 2).

    reward: (N, 2) -> (N,), read through group advantages by the hooks and never differentiated.
    """
    family, rng = Plane(teacher.unconditional), torch.Generator().manual_seed(plan.seed)
    labels = torch.full((len(start),), teacher.unconditional if plan.label is None else plan.label)
    particles, path = start.clone(), [start.clone()]
    for iteration in range(plan.iterations):
        order = torch.randperm(len(particles), generator=rng)
        x = particles[order].reshape(-1, *family.latent_shape()).requires_grad_()
        advantage = _advantage(x.detach().flatten(1), reward, plan)
        fake = optimal_fake(_rollout(x, labels, advantage), hooks)
        many = _rollout(x.repeat(plan.draws, 1, 1, 1), labels.repeat(plan.draws), advantage.repeat(plan.draws))
        low, high = plan.times
        t = low + (high - low) * torch.rand(len(many.x), generator=rng, dtype=torch.float64)
        noise = torch.randn(many.x.shape, generator=rng)
        loss, _ = student_loss(family, teacher, fake, many, t, noise, guidance=plan.guidance, hooks=hooks)
        (gradient,) = torch.autograd.grad(loss, x)
        # The loss is a mean over all elements, so this is the mean over draws of −H/n per particle.
        rate = plan.step * (min(1.0, 2 - 2 * iteration / plan.iterations) if plan.cools else 1.0)
        particles[order] -= rate * x.numel() * gradient.flatten(1)
        path.append(particles.clone())
    return torch.stack(path)


def _rollout(x: Tensor, labels: Tensor, advantage: Tensor) -> Rollout:
    return Rollout(x, {"labels": labels}, (), 1, 0, advantage.clone)


def _advantage(x: Tensor, reward: Reward | None, plan: Plan) -> Tensor:
    if reward is None:
        return torch.full((len(x),), math.nan)  # whatever reads it shows
    return reward(x) if plan.group is None else group_advantage(reward(x), plan.group, sigma_floor=plan.sigma_floor)
