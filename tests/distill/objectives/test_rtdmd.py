"""RTDMD's parts in a Gaussian world, where the tilted target, the exact score and the policy's gradient are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.families.base import Prediction, coefficients
from distill.math import convert
from distill.objectives.amd import RepulsiveSharpening
from distill.objectives.dmd import student_loss
from distill.objectives.plan import Hook, Roles, Rollout
from distill.objectives.rtdmd import PolicyGradient, RewardTilt, ScoreConsistency
from distill.sampling import Flow
from distill.tasks.common import to_uint8
from distill.toy import Mixture, Plan, Plane, distil

DIM, DEVIATION, MEAN = 4, 0.6, -0.5


class GaussianFamily:
    """Networks are pairs (mean, deviation) of Gaussians with their exact denoisers; latents are pictures."""

    prediction, schedule = "flow", Flow()

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Any, *, taps: Sequence[str] = ()) -> Prediction:
        mean, deviation = network
        alpha, sigma = (c[:, None].float() for c in coefficients(self.schedule, t))
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        x0 = mean + gain * (x_t - alpha * mean)
        flow = (x_t - x0) / sigma.clamp_min(1e-6)  # at t = 0 both are x_t
        return Prediction(*convert("flow", x_t, flow, *coefficients(self.schedule, t)), features={})

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


class Sealed(torch.autograd.Function):
    """λ·x of points (B, 2), which nothing can differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        return x @ slope

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("the reward was differentiated")


class Pictured(Plane):
    """Points as pictures, far from the ends of a picture's range."""

    def decode(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 100


class OfPoints:
    def __init__(self, rate: Callable[[Tensor], Tensor]) -> None:
        self.rate = rate

    def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
        return self.rate(100 * pixels)


def test_sharpening_and_the_tilt_reach_the_same_density_one_of_them_without_the_rewards_gradient() -> None:
    """p_real·e^{a} with a = (r − μ)/σ: of a Gaussian teacher N(m, s²) and r = λ·x it is N(m + s·λ/|λ|, s²).

    Sharpening scores r and no more; the tilt follows β·∇r with the matching strength β = 1/σ_r = 1/(s·|λ|) and knows
    no advantage. Same teacher, start, times and noise, 256 particles; means, widths and quartiles along λ agree with
    the closed form and with each other to 0.1 of the teacher's deviation, where the tilt is 1.0 of it.
    """
    slope, deviation, n = torch.tensor([0.9, -0.6]), 0.6, 256
    teacher = Mixture(torch.ones(1), torch.tensor([[0.5, -0.3]]), deviation)
    begin = 0.3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    plan, roles = Plan(group=n), Roles(Pictured(), teacher, teacher, teacher)
    beta = 1 / (deviation * float(slope.norm()))

    def tilted_by(rate: Callable[[Tensor], Tensor]) -> Tensor:
        return distil(teacher, begin, plan, [RewardTilt(roles, OfPoints(rate), beta=beta, deviation=deviation)])[-1]

    def sealed(x: Tensor) -> Tensor:
        return torch.as_tensor(Sealed.apply(x, slope))

    sharpened = distil(teacher, begin, plan, [RepulsiveSharpening(clipped=False)], sealed)[-1]
    tilted = tilted_by(lambda x: x @ slope)
    with pytest.raises(RuntimeError, match="the reward was differentiated"):
        tilted_by(sealed)

    expected = teacher.tilted(beta * slope)
    quarters = torch.tensor([0.25, 0.5, 0.75])
    normal = torch.distributions.Normal(0.0, 1.0).icdf(quarters)
    found = []
    for points in (sharpened, tilted):
        z = (points - expected.means[0]) / deviation
        along = (z @ (slope / slope.norm())).quantile(quarters)
        found.append(torch.cat((z.mean(0), z.std(0) - 1, along - normal)))
    for difference in (*found, found[0] - found[1]):
        torch.testing.assert_close(difference, torch.zeros(7), rtol=0, atol=0.1)
    shift = (expected.means - teacher.means)[0] / deviation
    torch.testing.assert_close(shift, slope / slope.norm())


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


# --- the fake score agrees with itself -----------------------------------------------------------------------------


class DriftingFamily(GaussianFamily):
    """High noise is denoised as if the data were eleven times as wide as for low noise: no density does that."""

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Any, *, taps: Sequence[str] = ()) -> Prediction:
        mean, deviation = network
        return super().predict((mean, deviation * (0.2 + 2.0 * (t[:, None] > 0.5).float())), x_t, t, condition)


def consistency_of(family: Any, fake: Any, n: int = 20_000) -> float:
    nothing: Any = None
    rng = torch.Generator().manual_seed(0)
    rollout = Rollout(MEAN + DEVIATION * torch.randn(n, DIM, generator=rng), {"c": torch.zeros(n)}, (), 1, 0)
    return float(ScoreConsistency(Roles(family, nothing, nothing, fake), weight=1.0, span=0.3).extra_fake_loss(rollout))


def test_denoisers_of_a_density_are_martingales_and_others_are_not() -> None:
    """Of any density, not of the samples' alone. Standard error over 20,000 samples in four dimensions: about 5e-4."""
    mean, deviation = torch.full((DIM,), MEAN), torch.tensor(DEVIATION)
    for fake in ((mean, deviation), (mean + 1.0, 2 * deviation)):
        assert abs(consistency_of(GaussianFamily(), fake)) < 2e-3
        assert consistency_of(DriftingFamily(), fake) > 5e-3


def test_steps_back_have_the_exact_mean_and_variance_of_the_reverse_process() -> None:
    """q(x_s | x_t, x0) ∝ q(x_s | x0)·q(x_t | x_s): the product of two Gaussians by their precisions, in float64."""
    family: Any = GaussianFamily()
    hook = ScoreConsistency(roles_of(family), weight=1.0)
    t, s = 0.7, 0.4
    x_t, x0, noise = torch.full((1, 1), 0.9), torch.full((1, 1), -0.2), torch.full((1, 1), 1.3)
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, s))
    found = float(hook._back(x_t, x0, *times, noise))
    a_t, a_s = 1 - t, 1 - s
    forward = t**2 - (a_t / a_s) ** 2 * s**2  # variance of x_t given x_s
    precision = 1 / s**2 + (a_t / a_s) ** 2 / forward
    mean = (a_s * -0.2 / s**2 + (a_t / a_s) * 0.9 / forward) / precision
    assert found == pytest.approx(mean + 1.3 / np.sqrt(precision), rel=1e-5)


def test_consistency_moves_the_fake_score_alone(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    rollout = rolled()
    loss = ScoreConsistency(roles, weight=0.5).extra_fake_loss(rollout)
    loss.backward()
    assert touched() == {"fake"}
    assert float(loss.detach()) == pytest.approx(0.5 * float(rollout.telemetry["consistency"]))


def test_no_step_leads_below_clean(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    loss = ScoreConsistency(roles, weight=1.0, span=1.0).extra_fake_loss(rolled(n=64))
    assert bool(loss.isfinite())


# --- the policy gradient -------------------------------------------------------------------------------------------


class Scored:
    """A reward of pictures alone: minus the squared distance of the first pixel from white, NaN for the third one."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
        r = -((images[:, 0, 0, 0].float() / 255 - 1.0) ** 2)
        return torch.where(torch.arange(len(r)) == 2, torch.nan, r) if self.broken else r


def test_the_gradient_is_that_of_the_weighted_log_probability(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    """Against float64 NumPy: dL/dx = −(2·λ·α·σ/(B·D))·a·ε, with a from the ends that the same noise leads to."""
    rollout = rolled(steps=3, index=0)
    rollout.x.retain_grad()
    hook = PolicyGradient(roles, Scored(broken=True), weight=0.7, group=4, bound=1.2)
    loss = hook.extra_student_loss(rollout)
    assert loss is not None
    loss.backward()
    assert touched() == {"student"} and rollout.x.grad is not None

    grid = [float(t) for t in roles.family.schedule.grid(3)]
    rng = rollout.random("policy")
    eps = torch.randn(rollout.x.shape, generator=rng)
    x = (1 - grid[1]) * rollout.samples + grid[1] * eps
    with torch.no_grad():
        for t, after in ((grid[1], grid[2]), (grid[2], None)):
            times = torch.full((8,), t, dtype=torch.float64)
            x0 = roles.family.predict(roles.student, x, times, rollout.condition).x0
            if after is not None:
                shared = torch.randn(2, 1, 8, 8, generator=rng).repeat_interleave(4, 0)
                x = (1 - after) * x0 + after * shared
    r = Scored().score(to_uint8(x0.expand(-1, 3, -1, -1)), ()).double().numpy().reshape(2, 4)
    r[0, 2] = r[0, [0, 1, 3]].mean()
    a = ((r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-6)).clip(-1.2, 1.2).flatten()
    expected = -2 * 0.7 * (1 - grid[1]) * grid[1] / (8 * 64) * a[:, None] * eps.double().numpy().reshape(8, -1)
    np.testing.assert_allclose(rollout.x.grad.reshape(8, -1).numpy(), expected, rtol=2e-4, atol=1e-9)
    assert a[2] == 0.0 and np.abs(a).max() > 0.5


def test_on_average_it_points_up_the_reward() -> None:
    """A linear student and reward: E[a·ε] is the unit vector of the reward's gradient, if groups are large."""

    class Linear:
        def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
            return images.float() @ direction

    class Wide(GaussianFamily):
        def decode(self, x: Tensor) -> Tensor:
            return x / 8  # far from the ends of the picture's range, in steps of 1/16

    direction = torch.tensor([2.0, -1.0, 0.0, 0.5])
    family: Any = Wide()
    nothing: Any = None
    student: Any = (torch.zeros(DIM), torch.tensor(1.0))
    x = torch.zeros(4096, DIM, requires_grad=True)
    rollout = Rollout(x, {"c": torch.zeros(4096)}, (0,) * 4096, 2, 0)
    hook = PolicyGradient(Roles(family, nothing, student, nothing), Linear(), weight=1.0, group=512)
    loss = hook.extra_student_loss(rollout)
    assert loss is not None
    loss.backward()
    assert x.grad is not None
    uphill = -x.grad.sum(0) * DIM / (2 * 0.5 * 0.5)
    torch.testing.assert_close(uphill, direction / direction.norm(), rtol=0, atol=0.06)


def test_a_last_step_has_no_policy(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook = PolicyGradient(roles, Scored(), weight=1.0, group=4)
    assert hook.extra_student_loss(rolled(steps=2, index=1)) is None
    assert hook.extra_student_loss(rolled(steps=1, index=0)) is None


def test_rewards_without_differences_move_nothing(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    class Constant:
        def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor:
            return torch.full((len(images),), 0.3)

    rollout = rolled(steps=2, index=0)
    rollout.x.retain_grad()
    loss = PolicyGradient(roles, Constant(), weight=1.0, group=4).extra_student_loss(rollout)
    assert loss is not None
    loss.backward()
    assert rollout.x.grad is not None and float(rollout.x.grad.abs().max()) == 0.0
