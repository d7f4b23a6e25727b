"""Gradient routing, and worlds with exact scores in which the fixed points of DMD and of AMD's sharpening are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.families.base import Prediction, coefficients
from distill.math import convert, group_advantage
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening
from distill.objectives.dmd import fake_loss, match, student_loss
from distill.objectives.plan import Hook, Matching, Rollout, fake_weight, student_weights
from distill.sampling import Flow

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
DIM = 6
NO_HOOKS: list[Hook] = []
SHARPENING: list[Hook] = [RepulsiveSharpening(clipped=False)]


class ExactFamily:
    """Flow matching in which a network is a denoiser (x_t, t, c) -> E[x0 | x_t, c], so that scores can be exact."""

    prediction, schedule = "flow", Flow()

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Any:
        x0 = network(x_t, t.to(x_t)[:, None], condition["c"])
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert("flow", x_t, (x_t - x0) / t.to(x_t)[:, None], alpha, sigma), features={})

    def unconditional(self, n: int) -> dict[str, Tensor]:
        return {"c": torch.zeros(n, 1)}


def mixture_denoiser(means: Tensor, deviation: Tensor) -> Denoiser:
    """E[x0 | x_t] for equally likely components N(means_k, deviation²·1) at x_t = (1 − t)·x0 + t·ε, in closed form."""

    def denoise(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        variance = ((1 - t) * deviation) ** 2 + t**2
        residual = x_t[:, None] - (1 - t)[..., None] * means
        weight = (-0.5 * residual.pow(2).sum(-1) / variance).softmax(1)
        gain = (1 - t) * deviation**2 / variance
        return (weight[..., None] * (means + gain[..., None] * residual)).sum(1)

    return denoise


def rollout_of(x: Tensor, advantage: Callable[[], Tensor] | None = None) -> Rollout:
    def none() -> Tensor:
        raise AssertionError("nothing here has an advantage")

    return Rollout(x, {"c": torch.ones(len(x), 1)}, (), 1, 0, advantage or none)


def times(n: int, rng: torch.Generator) -> Tensor:
    return 0.02 + 0.96 * torch.rand(n, generator=rng, dtype=torch.float64)


# --- routing -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(4, 2)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.linear(torch.cat((x_t, t, c), 1))


class Roles:
    """A student, a fake score and a teacher, all trainable, and a reward that could be differentiated."""

    def __init__(self) -> None:
        self.student, self.fake, self.teacher = Net(0), Net(1), Net(2)
        self.reward_weight = torch.ones(2, requires_grad=True)
        rng = torch.Generator().manual_seed(3)
        self.z, self.noise = torch.randn(2, 8, 2, generator=rng)
        self.t = times(8, rng)
        self.rollout = rollout_of(self.student(self.z, torch.ones(8, 1), torch.ones(8, 1)), self._advantage)
        self.hooks: list[Hook] = [DynamicScoreAdaptation(0.5), RepulsiveSharpening(group=4)]

    def _advantage(self) -> Tensor:
        return group_advantage(self.rollout.x @ self.reward_weight, 4)

    @torch.no_grad()
    def matching(self) -> Matching:
        return match(ExactFamily(), self.teacher, self.fake, self.rollout, self.t, self.noise, guidance=3.0)

    def student_loss(self) -> Tensor:
        return student_loss(
            ExactFamily(), self.teacher, self.fake, self.rollout, self.t, self.noise, guidance=3.0, hooks=self.hooks
        )[0]

    def fake_loss(self) -> Tensor:
        self.rollout.advantage = self._advantage().detach
        return fake_loss(ExactFamily(), self.fake, self.rollout, self.t, self.noise, hooks=self.hooks)[0]

    def touched(self) -> set[str]:
        """Names of what has received a gradient."""
        roles = {"student": self.student, "fake": self.fake, "teacher": self.teacher}
        found = {n for n, m in roles.items() if any(p.grad is not None for p in m.parameters())}
        return found | ({"reward"} if self.reward_weight.grad is not None else set())


def test_student_phase_moves_only_the_student() -> None:
    roles = Roles()
    roles.student_loss().backward()
    assert roles.touched() == {"student"}


def test_fake_phase_moves_only_the_fake_score() -> None:
    roles = Roles()
    roles.fake_loss().backward()
    assert roles.touched() == {"fake"}


def test_reward_weighs_the_student_but_is_not_differentiated() -> None:
    """The student's gradient is that of fixed weights: the same when the advantage comes without a graph."""
    gradients = []
    for detached in (False, True):
        roles = Roles()
        if detached:
            roles.rollout.advantage = roles._advantage().detach
        roles.student_loss().backward()
        gradients.append(roles.student.linear.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_what_hooks_weigh_has_no_graph() -> None:
    """Teacher and fake score are called without one, although both could be trained here."""
    seen: list[Matching] = []

    class Watching(Hook):
        def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
            seen.append(matching)
            return super().student_weights(rollout, matching)

    roles = Roles()
    roles.hooks.append(Watching())
    roles.student_loss()
    found = {name: value for name, value in vars(seen[0]).items() if isinstance(value, Tensor)}
    assert found.keys() >= {"x_c", "x_f", "dm", "ca", "scale"}
    assert [name for name, value in found.items() if value.requires_grad] == []


def test_hooks_multiply_their_weights_and_add_their_losses() -> None:
    class Extra(Hook):
        def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
            return torch.full((8,), 2.0), torch.full((8,), 3.0)

        def fake_weight(self, rollout: Rollout, t: Tensor) -> Tensor:
            return torch.full((8,), 5.0)

        def extra_student_loss(self, rollout: Rollout) -> Tensor:
            return rollout.x.sum()

        def extra_fake_loss(self, rollout: Rollout) -> Tensor:
            return torch.tensor(11.0)

    roles = Roles()
    hooks = [Extra(), *roles.hooks]
    alpha, beta = student_weights(roles.hooks, roles.rollout, roles.matching())
    weight = fake_weight(roles.hooks, roles.rollout, roles.t)
    both = student_weights(hooks, roles.rollout, roles.matching())
    assert torch.equal(both[0], 2 * alpha) and torch.equal(both[1], 3 * beta)
    assert torch.equal(fake_weight(hooks, roles.rollout, roles.t), 5 * weight)

    plain_student, plain_fake = Roles(), Roles()
    plain_student.hooks, plain_fake.hooks = [], []
    extra_student, extra_fake = Roles(), Roles()
    extra_student.hooks, extra_fake.hooks = [Extra()], [Extra()]
    # α = 2 and β = 3 change the loss as well, so only the fake's sum is simple.
    difference = extra_fake.fake_loss() - 5 * plain_fake.fake_loss()
    torch.testing.assert_close(difference, torch.tensor(11.0))
    extra_student.student_loss().backward()
    plain_student.student_loss().backward()
    bias, plain = extra_student.student.linear.bias.grad, plain_student.student.linear.bias.grad
    assert bias is not None and plain is not None and float((bias - 8).abs().max()) < 4 * float(plain.abs().max())


# --- DMD's fixed point is the teacher ------------------------------------------------------------------------------


def test_dmd_moves_a_mixture_onto_the_teacher() -> None:
    """A mixture of two Gaussians in 4-D as the student, its exact score as the fake score: it becomes the teacher."""
    teacher_means, teacher_deviation = torch.tensor([[1.5, 0.5, -0.5, 1.0], [-1.0, -1.0, 0.5, 0.0]]), torch.tensor(0.4)
    means = torch.tensor([[0.5, 0.8, 0.0, 0.2], [-0.3, -0.2, 0.0, -0.2]], requires_grad=True)
    log_deviation = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([means, log_deviation], lr=0.05, betas=(0.0, 0.99))
    rng = torch.Generator().manual_seed(0)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 250)
        which = torch.arange(256) % 2
        x = means[which] + log_deviation.exp() * torch.randn(256, 4, generator=rng)
        fake = mixture_denoiser(means.detach(), log_deviation.detach().exp())
        teacher = mixture_denoiser(teacher_means, teacher_deviation)
        t, noise = times(256, rng), torch.randn(256, 4, generator=rng)
        loss, _ = student_loss(ExactFamily(), teacher, fake, rollout_of(x), t, noise, guidance=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(means.detach(), teacher_means, rtol=0, atol=0.05)
    assert log_deviation.exp().item() == pytest.approx(0.4, abs=0.03)


def test_guidance_pushes_beyond_the_teacher_in_the_direction_of_the_condition() -> None:
    """With N(c, 1) as the teacher, c = 0 without a condition, and the fake score exact, H = (ω − 1)·(x_c − x_u) > 0."""

    def teacher(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return c + (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * c)

    x = torch.zeros(4, 1, requires_grad=True)
    t, noise = torch.full((4,), 0.5, dtype=torch.float64), torch.zeros(4, 1)
    loss, telemetry = student_loss(ExactFamily(), teacher, teacher, rollout_of(x), t, noise, guidance=3.0)
    loss.backward()
    # At t = ½ x_c − x_u = 1 − ½ = ½, so H = 2·½ = 1; the guided estimate is 3·½ = n, away from x = 0.
    assert x.grad is not None and float(telemetry["dm_norm"]) == 0.0
    torch.testing.assert_close(x.grad, torch.full((4, 1), -1.0 / 1.5 / 4))


# --- sharpening tilts the fixed point ------------------------------------------------------------------------------


class LinearDenoiser(nn.Module):
    """x0 = a·x_t + b per dimension at one fixed time: exact for independent Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((DIM,), 0.5)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.a * x_t + self.b


def fit_fake(fake: LinearDenoiser, rollout: Rollout, t: Tensor, noise: Tensor, hooks: list[Hook]) -> None:
    """Minimise fake_loss exactly: it is a quadratic function of two parameters."""
    optimizer = torch.optim.LBFGS(fake.parameters(), lr=1, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = fake_loss(ExactFamily(), fake, rollout, t, noise, hooks=hooks)
        loss.backward()
        return loss

    optimizer.step(closure)


def test_sharpened_fake_score_denoises_the_density_tilted_by_its_weight() -> None:
    """argmin E[e^{−a}·‖…‖²] is the denoiser of q ∝ p·e^{−a}; for p = N(μ, s²) and a = λ·x₀ that is N(μ − λs², s²).

    Tolerance: the standard error of 20,000 samples with a weight of relative variance e^{λ²s²} − 1 = 0.7.
    """
    mu, s, tilt = 0.7, 0.8, 0.9
    rng = torch.Generator().manual_seed(1)
    x, noise = mu + s * torch.randn(20_000, DIM, generator=rng), torch.randn(20_000, DIM, generator=rng)
    t = torch.full((20_000,), 0.5, dtype=torch.float64)
    for hooks, mean in ((NO_HOOKS, mu), (SHARPENING, mu - tilt * s**2)):
        fake = LinearDenoiser()
        fit_fake(fake, rollout_of(x, lambda: tilt * (x[:, 0] - mu)), t, noise, hooks)
        gain = 0.5 * s**2 / (0.25 * s**2 + 0.25)
        means = torch.tensor([mean, *[mu] * (DIM - 1)])
        torch.testing.assert_close(fake.a.detach(), torch.full((DIM,), gain), rtol=0, atol=0.04)
        torch.testing.assert_close(fake.b.detach(), means - gain * 0.5 * means, rtol=0, atol=0.04)


@pytest.mark.parametrize(("hooks", "shift"), [(NO_HOOKS, 0.0), (SHARPENING, 1.0)])
def test_sharpening_moves_the_student_one_deviation_up_the_reward(hooks: list[Hook], shift: float) -> None:
    """p ∝ p_real·e^{a} with a = (r − μ_g)/σ_g and r = x₀: N(m, v) becomes N(m + √v, v) in that dimension alone.

    Without sharpening the student stays the teacher. 2,048 samples per step; the end is averaged over 30 steps.
    """
    m, deviation, n = -0.5, 0.6, 2048
    mean = torch.full((DIM,), m, requires_grad=True)
    log_s = torch.full((DIM,), math.log(deviation), requires_grad=True)
    optimizer = torch.optim.SGD([mean, log_s], lr=0.5 * DIM)
    teacher, fake = mixture_denoiser(torch.full((1, DIM), m), torch.tensor(deviation)), LinearDenoiser()
    rng = torch.Generator().manual_seed(2)
    t, seen = torch.full((n,), 0.5, dtype=torch.float64), []
    for _ in range(80):
        x = mean + log_s.exp() * torch.randn(n, DIM, generator=rng)
        advantage = group_advantage(x.detach()[:, 0], n)
        rollout = rollout_of(x, advantage.clone)
        fit_fake(fake, rollout, t, torch.randn(n, DIM, generator=rng), hooks)
        noise = torch.randn(n, DIM, generator=rng)
        loss, _ = student_loss(ExactFamily(), teacher, fake, rollout, t, noise, guidance=1.0, hooks=hooks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(torch.stack((mean.detach(), log_s.detach().exp())))
    final_mean, final_s = torch.stack(seen[-30:]).mean(0)
    expected = torch.tensor([shift, *[0.0] * (DIM - 1)])
    torch.testing.assert_close((final_mean - m) / deviation, expected, rtol=0, atol=0.12)
    torch.testing.assert_close(final_s / deviation, torch.ones(DIM), rtol=0, atol=0.12)


def test_clipping_bounds_the_weights() -> None:
    rollout = rollout_of(torch.zeros(4, 1), lambda: torch.tensor([-9.0, -1.0, 0.0, 9.0]))
    clipped = RepulsiveSharpening(clipped=True).fake_weight(rollout, torch.zeros(4))
    torch.testing.assert_close(clipped, torch.tensor([math.e, math.e, 1.0, 1 / math.e]))
    assert float(RepulsiveSharpening(clipped=False).fake_weight(rollout, torch.zeros(4))[0]) == pytest.approx(
        math.exp(9.0)
    )
