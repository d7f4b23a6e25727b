"""The tilted target in a Gaussian world, where its fixed point p·e^{βr} is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.families.base import Prediction, coefficients
from distill.math import convert
from distill.objectives.dmd import student_loss
from distill.objectives.plan import Hook, Roles, Rollout
from distill.objectives.rtdmd import RewardTilt
from distill.sampling import Flow

DIM, DEVIATION, MEAN = 4, 0.6, -0.5


class GaussianFamily:
    """Networks are pairs (mean, deviation) of Gaussians with their exact denoisers; latents are pictures."""

    prediction, schedule = "flow", Flow()

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Any, *, taps: Sequence[str] = ()) -> Prediction:
        mean, deviation = network
        alpha, sigma = (c[:, None].float() for c in coefficients(self.schedule, t))
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        x0 = mean + gain * (x_t - alpha * mean)
        return Prediction(*convert("flow", x_t, (x_t - x0) / sigma, *coefficients(self.schedule, t)), features={})

    def unconditional(self, n: int) -> dict[str, Tensor]:
        return {"c": torch.zeros(n)}

    def decode(self, x: Tensor) -> Tensor:
        return x / 100  # far from the ends of the picture's range


class LinearReward:
    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
        return 100 * pixels @ self.direction


def roles_of(family: GaussianFamily) -> Roles:
    nothing: Any = None
    return Roles(family, nothing, nothing, nothing)


def test_the_fixed_point_is_the_tilted_teacher() -> None:
    """N(m, s²) tilted by e^{β·g·x} is N(m + β·s²·g, s²): the mean moves, the width does not."""
    direction, beta = torch.tensor([1.0, -0.5, 0.0, 0.0]), 2.0
    family: Any = GaussianFamily()
    tilt = RewardTilt(roles_of(family), LinearReward(direction), beta=beta, deviation=DEVIATION)
    teacher: Any = (torch.full((DIM,), MEAN), torch.tensor(DEVIATION))
    for hooks, shift in (([], 0.0), ([tilt], beta * DEVIATION**2)):
        mean = torch.full((DIM,), MEAN + 0.5, requires_grad=True)
        log_s = torch.full((DIM,), 0.3, requires_grad=True)
        optimizer = torch.optim.Adam([mean, log_s], lr=0.05, betas=(0.0, 0.99))
        rng = torch.Generator().manual_seed(0)
        for step in range(250):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 250)
            x = mean + log_s.exp() * torch.randn(256, DIM, generator=rng)
            fake: Any = (mean.detach(), log_s.detach().exp())
            t = 0.1 + 0.8 * torch.rand(256, generator=rng, dtype=torch.float64)
            rollout = Rollout(x, {"c": torch.zeros(256)}, (), 1, 0)
            more: list[Hook] = list(hooks)
            noise = torch.randn(256, DIM, generator=rng)
            loss, _ = student_loss(family, teacher, fake, rollout, t, noise, guidance=1.0, hooks=more)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(mean.detach(), MEAN + shift * direction, rtol=0, atol=0.05)
        torch.testing.assert_close(log_s.detach().exp(), torch.full((DIM,), DEVIATION), rtol=0, atol=0.04)


def test_the_displacement_is_the_posterior_covariance_times_the_gradient() -> None:
    direction = torch.tensor([1.0, 2.0, 0.0, -1.0])
    family: Any = GaussianFamily()
    tilt = RewardTilt(roles_of(family), LinearReward(direction), beta=0.5, deviation=DEVIATION)
    rollout, t = Rollout(torch.zeros(3, DIM), {}, (), 1, 0), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    matching: Any = type("Matching", (), {"t": t})()
    found = tilt.displacement(rollout, matching)
    v = torch.tensor([0.0, 0.36 * 0.25 / (0.25 * 0.36 + 0.25), 0.36])
    torch.testing.assert_close(found, 0.5 * v[:, None] * direction)
    assert not found.requires_grad
