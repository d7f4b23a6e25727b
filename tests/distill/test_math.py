"""The method's formulas against float64 NumPy references written from the papers, and AMD's identities."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import math
from distill.families.base import Prediction
from distill.objectives import amd
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening
from distill.objectives.dmd import by_noise, fake_loss, student_loss
from distill.objectives.plan import Hook, Rollout
from distill.sampling import Flow, ScaledLinear, x0_coefficients
from distill.telemetry.sink import summary

Array = NDArray[np.float64]
SHAPE = (2, 3, 3)
DIM = 18
OMEGA = 7.5
PREDICTIONS = ("epsilon", "x0", "v", "flow")


def alpha_sigma(prediction: str, t: Array) -> tuple[Array, Array]:
    """The textbook schedules: ᾱ as a product of 1 − β with √β linear (SDXL), or (1 − t, t)."""
    if prediction == "flow":
        return 1 - t, t
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    cumulative = np.cumprod(1 - np.array(betas))[t.astype(int)]
    return np.sqrt(cumulative), np.sqrt(1 - cumulative)


class Family:
    """A family whose networks are affine maps (weight, bias, label weight): what NumPy can repeat."""

    def __init__(self, prediction: str) -> None:
        self.prediction = prediction
        self.schedule: Any = Flow() if prediction == "flow" else ScaledLinear()

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Any:
        output = network(torch.cat((x_t.flatten(1), condition["c"]), 1)).reshape(x_t.shape)
        times = t.double().numpy()
        alpha, sigma = (torch.from_numpy(f(times)) for f in (self.schedule.alpha, self.schedule.sigma))
        return Prediction(*math.convert(self.prediction, x_t, output, alpha, sigma), features={})

    def unconditional(self, n: int) -> dict[str, Tensor]:
        return {"c": torch.zeros(n, 2)}


def network(seed: int) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(DIM + 2, DIM)


class Case:
    """A batch of 8 in two groups of 4, with samples of very different sizes, and everything that a loss reads."""

    def __init__(self, prediction: str, rewards: Tensor | None = None) -> None:
        rng = torch.Generator().manual_seed(5)
        self.family = Family(prediction)
        self.x = torch.randn(8, *SHAPE, generator=rng) * torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)
        self.condition = {"c": torch.randn(8, 2, generator=rng)}
        self.noise = torch.randn(8, *SHAPE, generator=rng)
        u = 0.05 + 0.9 * torch.rand(8, generator=rng, dtype=torch.float64)
        self.t = u if prediction == "flow" else (999 * u).round()
        self.rewards = torch.randn(8, generator=rng) if rewards is None else rewards
        self.teacher, self.fake = network(1), network(2)

    def loss(self, hooks: list[Hook], rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """(loss, its gradient with respect to x) of some rows."""
        i = torch.arange(8) if rows is None else torch.tensor(rows)
        x = self.x[i].requires_grad_()
        rollout = Rollout(x, {"c": self.condition["c"][i]}, (), 4, 0, lambda: math.group_advantage(self.rewards[i], 4))
        loss, _ = student_loss(
            self.family, self.teacher, self.fake, rollout, self.t[i], self.noise[i], guidance=OMEGA, hooks=hooks
        )
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    def decoupled(self, t: Tensor, noise: Tensor, hooks: list[Hook]) -> Tensor:
        """The gradient when guidance is re-noised at t with noise, apart from matching."""
        x = self.x.clone().requires_grad_()
        rollout = Rollout(x, self.condition, (), 4, 0, lambda: math.group_advantage(self.rewards, 4))
        networks = (self.family, self.teacher, self.fake)
        loss, _ = student_loss(*networks, rollout, self.t, self.noise, guidance=OMEGA, hooks=hooks, ca=(t, noise))
        loss.backward()
        assert x.grad is not None
        return x.grad

    def weighted_error(self, hooks: list[Hook], rows: list[int] | None = None) -> Tensor:
        """The fake score's loss of some rows."""
        i = torch.arange(8) if rows is None else torch.tensor(rows)
        condition, advantage = {"c": self.condition["c"][i]}, math.group_advantage(self.rewards[i], 4)
        rollout = Rollout(self.x[i], condition, (), 4, 0, lambda: advantage)
        return fake_loss(self.family, self.fake, rollout, self.t[i], self.noise[i], hooks=hooks)[0].detach()


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def clean_estimates(
    case: Case, t: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Array, Array, Array, Array]:
    """(x, x_c, x_u, x_f) as (8, DIM) float64 at the case's point or another, from the networks' weights alone."""
    prediction = case.family.prediction
    alpha, sigma = (a[:, None] for a in alpha_sigma(prediction, f64(case.t if t is None else t)))
    x = f64(case.x).reshape(8, DIM)
    x_t = alpha * x + sigma * f64(case.noise if noise is None else noise).reshape(8, DIM)

    def estimate(net: torch.nn.Linear, condition: Array) -> Array:
        m = np.concatenate((x_t, condition), 1) @ f64(net.weight).T + f64(net.bias)
        if prediction == "epsilon":
            return np.asarray((x_t - sigma * m) / alpha)
        if prediction == "x0":
            return m
        return np.asarray(alpha * x_t - sigma * m if prediction == "v" else x_t - sigma * m)

    c = f64(case.condition["c"])
    return x, estimate(case.teacher, c), estimate(case.teacher, 0 * c), estimate(case.fake, c)


def dmd2_gradient(x: Array, x_c: Array, x_u: Array, x_f: Array, alpha: Array, beta: Array) -> tuple[float, Array]:
    """DMD2 (arXiv 2405.14867, §3): grad = (p_real − p_fake)/mean|p_real| with p = x − x̂, loss ½·mse(x, sg[x − grad]).

    AMD splits p_real − p_fake into β·(x̂_f − x̂_c) + α·(ω − 1)·(x̂_u − x̂_c); both weights are 1 for DMD2.
    """
    p_real = x - (x_u + OMEGA * (x_c - x_u))
    grad = beta[:, None] * (x_f - x_c) + alpha[:, None] * (OMEGA - 1) * (x_u - x_c)
    grad = grad / np.abs(p_real).mean(1, keepdims=True)
    return float(0.5 * (grad**2).mean()), grad / grad.size


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dmd2_loss_and_gradient_match_the_paper(prediction: str) -> None:
    case = Case(prediction)
    expected_loss, expected = dmd2_gradient(*clean_estimates(case), np.ones(8), np.ones(8))
    loss, gradient = case.loss([])
    assert float(loss) == pytest.approx(expected_loss, rel=2e-5)
    np.testing.assert_allclose(f64(gradient).reshape(8, DIM), expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_amd_gradient_matches_equations_10_12_and_13(prediction: str) -> None:
    case = Case(prediction)
    r = f64(case.rewards).reshape(2, 4)
    a = np.clip((r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-6), -1, 1).reshape(-1)
    assert a.min() == -1 and a.max() == 1 and np.abs(a).min() < 1
    _, expected = dmd2_gradient(*clean_estimates(case), 1 + 0.4 * a, 1 - 0.4 * a)
    _, gradient = case.loss([DynamicScoreAdaptation(0.4)])
    np.testing.assert_allclose(f64(gradient).reshape(8, DIM), expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("strength", [None, 0.4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_decoupled_gradient_takes_each_part_from_its_own_point(prediction: str, strength: float | None) -> None:
    """D-DMD (arXiv 2511.22677, Eq. 8): s_c − s_f at τ_DM plus (ω − 1)(s_c − s_u) at τ_CA, one normaliser for both.

    With AMD's adaptation β multiplies the first part and α the second, and the normaliser knows neither.
    """
    case, rng = Case(prediction), torch.Generator().manual_seed(9)
    noise = torch.randn(8, *SHAPE, generator=rng)
    t = 0.6 * case.t if prediction == "flow" else (0.6 * case.t).round()
    x, x_c, _, x_f = clean_estimates(case)
    _, y_c, y_u, _ = clean_estimates(case, t, noise)
    hooks: list[Hook] = [] if strength is None else [DynamicScoreAdaptation(strength)]
    tilt = (strength or 0.0) * np.clip(f64(math.group_advantage(case.rewards, 4)), -1, 1)[:, None]
    grad = (1 - tilt) * (x_f - x_c) + (1 + tilt) * (OMEGA - 1) * (y_u - y_c)
    grad = grad / np.abs(x - (x_c + (OMEGA - 1) * (y_c - y_u))).mean(1, keepdims=True)
    expected = grad / grad.size
    found = f64(case.decoupled(t, noise, hooks)).reshape(8, DIM)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_self_forcings_guidance_is_ours_with_one_more(prediction: str) -> None:
    """Its code has c + g·(c − u): the same gradient as ω = g + 1 in the standard form, with its own normaliser."""
    case = Case(prediction)
    x, x_c, x_u, x_f = clean_estimates(case)
    guided = x_c + (OMEGA - 1) * (x_c - x_u)
    grad = (x_f - guided) / np.abs(x - guided).mean(1, keepdims=True)
    expected = grad / grad.size
    found = f64(case.loss([])[1]).reshape(8, DIM)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("hooks", [[], [DynamicScoreAdaptation(0.3)]])
def test_the_gradient_is_the_papers_in_pure_noise(hooks: list[Hook]) -> None:
    """v-prediction with α = 0 at the last timestep: x̂ = −v, and nothing is divided by α."""
    case = Case("v")
    case.family.schedule = ScaledLinear(zero_terminal=True)
    case.t = torch.full((8,), 999.0, dtype=torch.float64)
    x_t = f64(case.noise).reshape(8, DIM)

    def estimate(net: torch.nn.Linear, condition: Array) -> Array:
        return -(np.concatenate((x_t, condition), 1) @ f64(net.weight).T + f64(net.bias))

    c, a = f64(case.condition["c"]), np.zeros(8)
    if hooks:
        a = np.clip(f64(math.group_advantage(case.rewards, 4)), -1, 1)
    estimates = estimate(case.teacher, c), estimate(case.teacher, 0 * c), estimate(case.fake, c)
    _, expected = dmd2_gradient(f64(case.x).reshape(8, DIM), *estimates, 1 + 0.3 * a, 1 - 0.3 * a)
    found = f64(case.loss(hooks)[1]).reshape(8, DIM)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_fake_loss_is_the_weighted_denoising_error(prediction: str) -> None:
    case = Case(prediction)
    alpha, sigma = (a[:, None] for a in alpha_sigma(prediction, f64(case.t)))
    x, noise = f64(case.x).reshape(8, DIM), f64(case.noise).reshape(8, DIM)
    x_t = alpha * x + sigma * noise
    m = np.concatenate((x_t, f64(case.condition["c"])), 1) @ f64(case.fake.weight).T + f64(case.fake.bias)
    target = {"epsilon": noise, "x0": x, "v": alpha * noise - sigma * x, "flow": noise - x}[prediction]
    errors = ((m - target) ** 2).mean(1)
    assert float(case.weighted_error([])) == pytest.approx(errors.mean(), rel=1e-4)

    r = f64(case.rewards).reshape(2, 4)
    a = (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-6)
    for clipped, group, weight in (
        (False, None, np.exp(-a)),
        (True, None, np.exp(-np.clip(a, -1, 1))),
        (True, 4, np.exp(-np.clip(a, -1, 1)) / np.exp(-np.clip(a, -1, 1)).mean(1, keepdims=True)),
    ):
        found = case.weighted_error([RepulsiveSharpening(clipped=clipped, group=group)])
        assert float(found) == pytest.approx((weight.reshape(-1) * errors).mean(), rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_amd_without_strength_is_dmd2_to_the_last_bit(prediction: str) -> None:
    case = Case(prediction)
    plain, hooked = case.loss([]), case.loss([DynamicScoreAdaptation(0.0)])
    assert torch.equal(plain[0], hooked[0]) and torch.equal(plain[1], hooked[1])


@pytest.mark.parametrize("reward", [0.0, 0.1, 23.456, -7.7])
@pytest.mark.parametrize("group", [2, 3, 4, 5, 8, 16])
def test_equal_rewards_have_advantage_zero_to_the_last_bit(reward: float, group: int) -> None:
    rewards = torch.full((2 * group,), reward)
    assert torch.equal(math.group_advantage(rewards, group), torch.zeros(2 * group))


def test_constant_rewards_are_dmd2_to_the_last_bit() -> None:
    case = Case("epsilon", rewards=torch.tensor([23.456] * 4 + [-0.1] * 4))
    plain, hooked = case.loss([]), case.loss([DynamicScoreAdaptation(0.5)])
    assert torch.equal(plain[0], hooked[0]) and torch.equal(plain[1], hooked[1])
    for group in (None, 4):
        assert torch.equal(case.weighted_error([]), case.weighted_error([RepulsiveSharpening(group=group)]))


def test_operator_is_dmd_with_a_guidance_and_a_step_size_per_sample() -> None:
    rng = torch.Generator().manual_seed(0)
    x_c, x_u, x_f = torch.randn(3, 6, *SHAPE, generator=rng, dtype=torch.float64)
    advantage = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.6, 2.0], dtype=torch.float64)
    alpha, beta = math.adaptive_weights(math.squash(advantage), 0.5)
    h = math.operator(
        math.dm_displacement(x_c, x_f), math.ca_displacement(x_c, x_u), guidance=OMEGA, alpha=alpha, beta=beta
    )
    for i in range(6):
        omega = 1 + float(alpha[i] / beta[i]) * (OMEGA - 1)
        torch.testing.assert_close(h[i], beta[i] * (math.guide(x_u[i], x_c[i], omega) - x_f[i]))


def test_operator_weights_each_displacement_with_its_own_coefficient() -> None:
    one = torch.ones(1, 1)
    dm, ca = 3.0 * one, 5.0 * one
    h = math.operator(dm, ca, guidance=3.0, alpha=torch.tensor([1.5]), beta=torch.tensor([0.5]))
    assert h.item() == 0.5 * 3.0 + 1.5 * 2.0 * 5.0


def test_guidance_is_the_standard_form() -> None:
    x_u, x_c = torch.tensor([1.0]), torch.tensor([3.0])
    assert [math.guide(x_u, x_c, scale).item() for scale in (0.0, 1.0, 4.0)] == [1.0, 3.0, 9.0]


def test_poor_samples_get_more_matching_and_good_ones_more_guidance() -> None:
    alpha, beta = math.adaptive_weights(math.squash(torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 5.0])), 0.2)
    torch.testing.assert_close(alpha, torch.tensor([0.8, 0.8, 0.9, 1.0, 1.1, 1.2, 1.2]))
    torch.testing.assert_close(beta, torch.tensor([1.2, 1.2, 1.1, 1.0, 0.9, 0.8, 0.8]))
    torch.testing.assert_close(alpha + beta, torch.full((7,), 2.0))


def test_advantage_is_standardised_in_each_group_alone() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 100.0, 140.0, 100.0, 140.0])
    a = math.group_advantage(rewards, 4)
    deviation = np.sqrt((4 + 1 + 0 + 9) / 4)
    expected = [-2 / deviation, -1 / deviation, 0, 3 / deviation, -1, 1, -1, 1]
    torch.testing.assert_close(a, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    shifted = math.group_advantage(7 * rewards - 3, 4)
    torch.testing.assert_close(shifted, a, rtol=1e-4, atol=1e-5)


def test_sigma_floor_shrinks_the_advantages_of_equal_samples_only() -> None:
    rewards = torch.tensor([0.00, 0.01, 0.0, 1.0])
    raw, floored = math.group_advantage(rewards, 2), math.group_advantage(rewards, 2, sigma_floor=0.1)
    torch.testing.assert_close(raw, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=3e-4, atol=0.0)
    torch.testing.assert_close(floored, torch.tensor([-0.05, 0.05, -1.0, 1.0]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("count", "group"), [(6, 4), (4, 1), (3, 8), (4, 0)])
def test_rewards_that_form_no_groups_are_refused(count: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"{count} rewards do not form groups of {group}"):
        math.group_advantage(torch.zeros(count), group)


def test_sharpening_weighs_poor_samples_more_and_keeps_the_mean_of_a_group() -> None:
    a = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, -2.0, 0.0, 0.0])
    torch.testing.assert_close(f64(math.sharpening_weight(a)), np.exp(-f64(a)), rtol=1e-6, atol=0.0)
    weight = math.sharpening_weight(a, group=4)
    torch.testing.assert_close(weight.reshape(2, 4).mean(1), torch.ones(2))
    torch.testing.assert_close(weight[0] / weight[3], torch.tensor(np.e**2, dtype=torch.float32))


def test_effective_sample_size_is_the_fraction_of_samples_that_count() -> None:
    assert float(math.effective_sample_size(torch.full((8,), 3.0))) == pytest.approx(1.0)
    assert float(math.effective_sample_size(torch.tensor([0.0, 0.0, 0.0, 5.0]))) == pytest.approx(0.25)
    assert float(math.effective_sample_size(torch.zeros(4))) == 0.0


# --- samples do not see each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_batch_of_one_gives_each_sample_the_gradient_of_the_whole_batch(prediction: str) -> None:
    case = Case(prediction)
    together = case.loss([])[1]
    for i in range(8):
        alone = case.loss([], rows=[i])[1][0]
        torch.testing.assert_close(8 * together[i], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_groups_do_not_see_each_other() -> None:
    case, hooks = Case("epsilon"), [DynamicScoreAdaptation(0.3)]
    together = case.loss(hooks)[1]
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        alone = case.loss(hooks, rows=rows)[1]
        torch.testing.assert_close(2 * together[rows], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_permuting_a_group_permutes_its_gradients() -> None:
    case, hooks = Case("v"), [DynamicScoreAdaptation(0.3)]
    order = [2, 0, 3, 1, 4, 5, 6, 7]
    straight, permuted = case.loss(hooks)[1], case.loss(hooks, rows=order)[1]
    torch.testing.assert_close(permuted, straight[order], rtol=1e-4, atol=1e-6 * float(straight.abs().max()))
    sharp = [RepulsiveSharpening(group=4)]
    torch.testing.assert_close(case.weighted_error(sharp), case.weighted_error(sharp, rows=order))


def test_normaliser_is_per_sample_and_never_zero() -> None:
    x = torch.zeros(3, 2, 2)
    guided = torch.stack((torch.full((2, 2), -2.0), torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2)))
    torch.testing.assert_close(math.normaliser(x, guided), torch.tensor([2.0, 1.0, 1e-6]), rtol=1e-6, atol=0.0)


# --- the pseudo target ---------------------------------------------------------------------------------------------


def test_pseudo_target_pulls_along_the_displacement_and_is_itself_no_variable() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    d = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = math.pseudo_target_loss(x, d)
    torch.testing.assert_close(loss, 0.5 * d.detach().pow(2).mean(1))
    loss.sum().backward()
    assert d.grad is None and x.grad is not None
    torch.testing.assert_close(x.grad, -d.detach() / 4)


def test_pseudo_target_keeps_small_displacements_of_bfloat16_samples() -> None:
    """In bfloat16 x − (x + d) would round to zero."""
    x = torch.full((1, 4), 3.0, dtype=torch.bfloat16).requires_grad_()
    math.pseudo_target_loss(x, torch.full((1, 4), 1e-3)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), torch.full((1, 4), -2.5e-4), rtol=1e-2, atol=0.0)


# --- conversions ---------------------------------------------------------------------------------------------------

CONVERSIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "epsilon": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "flow": lambda x0, eps, a, s: eps - x0,
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_conversion_returns_the_sample_and_the_noise(prediction: str) -> None:
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 5, DIM))
    t = np.array([0.02, 0.3, 0.5, 0.9, 0.98]) if prediction == "flow" else np.array([0.0, 19, 500, 979, 999])
    a, s = alpha_sigma(prediction, t)
    x_t = a[:, None] * x0 + s[:, None] * eps
    m = CONVERSIONS[prediction](x0, eps, a[:, None], s[:, None])
    tensors = [torch.from_numpy(v) for v in (x_t, m, a, s)]

    result = Prediction(*math.convert(prediction, *tensors), features={})
    for found, expected in ((result.x0, x0), (result.eps, eps), (result.v, a[:, None] * eps - s[:, None] * x0)):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)

    noisy = math.add_noise(torch.from_numpy(x0), torch.from_numpy(eps), tensors[2], tensors[3])
    np.testing.assert_allclose(noisy.numpy(), x_t, rtol=1e-12)
    target = math.target_for(prediction, torch.from_numpy(x0), torch.from_numpy(eps), tensors[2], tensors[3])
    np.testing.assert_allclose(target.numpy(), m, rtol=1e-12)

    p, q = x0_coefficients(prediction, a, s)
    np.testing.assert_allclose(p[:, None] * x_t + q[:, None] * m, x0, rtol=1e-7, atol=1e-9)


def test_coefficients_are_used_in_float64() -> None:
    """At t = 999 an ε-prediction is divided by √ᾱ = 0.068: float32 coefficients would cost two digits."""
    a, s = alpha_sigma("epsilon", np.array([999.0]))
    x_t, m = torch.full((1, 4), 1.2345678), torch.full((1, 4), 1.1987654)
    expected = (float(x_t[0, 0]) - s[0] * float(m[0, 0])) / a[0]
    found = math.convert("epsilon", x_t, m, torch.from_numpy(a), torch.from_numpy(s))[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)


def test_unknown_predictions_are_refused() -> None:
    x, c = torch.zeros(1, 2), torch.ones(1)
    for call in (
        lambda: math.convert("score", x, x, c, c),
        lambda: math.target_for("score", x, x, c, c),
    ):
        with pytest.raises(ValueError, match="'score'; use epsilon, x0, v or flow"):
            call()


# --- mutations: each of the mistakes that are easy to make is seen ----------------------------------------------------

MUTATIONS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "the advantage's sign": (
        "group_advantage", "(r - r.mean(1, keepdim=True))", "(r.mean(1, keepdim=True) - r)",
        test_advantage_is_standardised_in_each_group_alone,
    ),
    "the sign in W": (
        "sharpening_weight", "torch.exp(-advantage)", "torch.exp(advantage)",
        test_sharpening_weighs_poor_samples_more_and_keeps_the_mean_of_a_group,
    ),
    "α in the place of β where they are made": (
        "adaptive_weights", "1.0 + strength * squashed, 1.0 - strength * squashed",
        "1.0 - strength * squashed, 1.0 + strength * squashed",
        test_poor_samples_get_more_matching_and_good_ones_more_guidance,
    ),
    "α in the place of β where they act": (
        "operator", "expand(beta, dm) * dm + expand(alpha, ca)", "expand(alpha, dm) * dm + expand(beta, ca)",
        test_operator_weights_each_displacement_with_its_own_coefficient,
    ),
    "a target that moves with the sample": (
        "pseudo_target_loss", "x.detach()", "x",
        test_pseudo_target_pulls_along_the_displacement_and_is_itself_no_variable,
    ),
    "a displacement with a graph": (
        "pseudo_target_loss", "displacement.detach()", "displacement",
        test_pseudo_target_pulls_along_the_displacement_and_is_itself_no_variable,
    ),
    "n over the batch": (
        "normaliser", ".flatten(1).mean(1)", ".mean().expand(len(x))", test_normaliser_is_per_sample_and_never_zero,
    ),
    "advantages over the batch": (
        "group_advantage", "reshape(-1, group)", "reshape(1, -1)", test_groups_do_not_see_each_other,
    ),
    "W scaled over the batch": (
        "sharpening_weight", "reshape(-1, group)", "reshape(1, -1)",
        test_sharpening_weighs_poor_samples_more_and_keeps_the_mean_of_a_group,
    ),
}  # fmt: skip
"""By mistake: the function, what stands in it, what could stand there instead, and a test that then fails."""


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mistake_in_a_formula_fails_a_test(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    name, right, wrong, guard = MUTATIONS[mistake]
    source = inspect.getsource(getattr(math, name))
    assert source.count(right) == 1, f"{name} no longer has {right!r}; say the mistake in its present words"
    scope = dict(vars(math))
    exec(source.replace(right, wrong), scope)
    guard()
    for module in (math, amd):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, scope[name])
    with pytest.raises(AssertionError):
        guard()


# --- what is logged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["together", "decoupled"])
def test_the_log_tells_the_lengths_the_angle_and_the_normaliser_of_both_displacements(apart: bool) -> None:
    """Means over samples of ‖x_c − x_f‖, ‖x_c − x_u‖, their cosine and n, and of each sample α, β and ω_i."""
    case = Case("flow")
    rng = torch.Generator().manual_seed(9)
    t, noise = 0.1 + 0.8 * torch.rand(8, generator=rng, dtype=torch.float64), torch.randn(8, *SHAPE, generator=rng)
    rollout = Rollout(case.x, case.condition, (), 4, 0, lambda: math.group_advantage(case.rewards, 4))
    _, told = student_loss(
        case.family, case.teacher, case.fake, rollout, case.t, case.noise, guidance=OMEGA,
        hooks=[DynamicScoreAdaptation(0.3)], ca=(t, noise) if apart else None,
    )  # fmt: skip
    x, x_c, x_u, x_f = clean_estimates(case)
    _, elsewhere, empty, _ = clean_estimates(case, t, noise) if apart else (x, x_c, x_u, x_f)
    dm, ca = x_c - x_f, elsewhere - empty
    lengths = [np.sqrt((d**2).sum(1)) for d in (dm, ca)]
    r = f64(case.rewards).reshape(2, 4)
    a = np.clip((r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True), -1, 1).ravel()
    expected = {
        "dm_norm": lengths[0].mean(),
        "ca_norm": lengths[1].mean(),
        "dm_ca_cos": ((dm * ca).sum(1) / lengths[0] / lengths[1]).mean(),
        "normaliser": np.abs(x - (x_c + (OMEGA - 1) * ca)).mean(1).mean(),
        "alpha": 1 + 0.3 * a,
        "beta": 1 - 0.3 * a,
        "omega": 1 + (1 + 0.3 * a) / (1 - 0.3 * a) * (OMEGA - 1),
        "x_std": x.std(ddof=1),
    }
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        assert isinstance(told[name], Tensor)
        np.testing.assert_allclose(f64(told[name]), value, rtol=1e-4, err_msg=name)


def test_errors_are_told_by_the_fifth_of_the_time_axis_in_which_they_were_made() -> None:
    """A bin begins at its lower edge; the last holds the end of the axis as well."""
    times = torch.tensor([0.0, 0.19, 0.2, 0.39, 0.61, 0.79, 0.8, 1.0], dtype=torch.float64)
    errors = torch.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 6.0, 7.0, 9.0])
    told = by_noise("fake_error", errors, times)
    assert list(told) == [f"fake_error/t{fifth}" for fifth in ("0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1")]
    numbers, _, _ = summary({name: [value] for name, value in told.items()})
    assert numbers == {
        "fake_error/t0-0.2": 2.0, "fake_error/t0.2-0.4": 15.0, "fake_error/t0.6-0.8": 5.5, "fake_error/t0.8-1": 8.0,
    }  # fmt: skip


def test_the_bins_of_a_fake_loss_are_those_of_its_own_times_and_errors() -> None:
    """Timesteps of a discrete schedule, as fractions of the last one."""
    case = Case("epsilon")
    case.t = torch.tensor([10, 150, 210, 390, 450, 590, 820, 999], dtype=torch.float64)
    rollout = Rollout(case.x, case.condition, (), 4, 0)
    _, told = fake_loss(case.family, case.fake, rollout, case.t, case.noise)
    numbers, _, _ = summary({name: [value] for name, value in told.items()})
    output = native_outputs(case)
    errors = ((output - f64(case.noise).reshape(8, DIM)) ** 2).mean(1).reshape(4, 2).mean(1)
    for name, value in zip(("t0-0.2", "t0.2-0.4", "t0.4-0.6", "t0.8-1"), errors, strict=True):
        assert numbers[f"fake_error/{name}"] == pytest.approx(value, rel=1e-4)
    assert numbers["fake_error"] == pytest.approx(errors.mean(), rel=1e-4) and "fake_error/t0.6-0.8" not in numbers


def native_outputs(case: Case) -> Array:
    """What the fake score's affine map gives at the case's point, (8, DIM)."""
    alpha, sigma = (a[:, None] for a in alpha_sigma(case.family.prediction, f64(case.t)))
    x_t = alpha * f64(case.x).reshape(8, DIM) + sigma * f64(case.noise).reshape(8, DIM)
    inputs = np.concatenate((x_t, f64(case.condition["c"])), 1)
    return np.asarray(inputs @ f64(case.fake.weight).T + f64(case.fake.bias))
