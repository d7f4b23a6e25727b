"""TDM's segments, its mixed noise and the weight of the fake score's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.families.base import Prediction, coefficients
from distill.math import convert, min_snr_weight, target_for
from distill.objectives.plan import Roles, Rollout, time_at
from distill.objectives.tdm import SubIntervalMatching
from distill.sampling import Flow, ScaledLinear


@pytest.mark.parametrize(("index", "low", "high"), [(0, 0.75, 0.98), (1, 0.5, 0.75), (3, 0.02, 0.25)])
def test_each_step_is_renoised_in_its_own_segment(
    roles: Roles, rolled: Callable[..., Rollout], index: int, low: float, high: float
) -> None:
    hook, rollout = SubIntervalMatching(roles, deterministic=False), rolled(index=index, n=2)
    rollout.x = torch.zeros(2000, 1)
    for part in ("dm", "fake"):
        found = hook.times(rollout, part, torch.Generator().manual_seed(0), 0.02, 0.98)  # type: ignore[arg-type]
        assert found is not None and low <= float(found.min()) and float(found.max()) <= high
        assert float(found.mean()) == pytest.approx((low + high) / 2, abs=0.01)
    assert hook.times(rollout, "ca", torch.Generator(), 0.02, 0.98) is None


def test_segments_of_discrete_schedules_share_no_timestep() -> None:
    """Four steps from 999, 749, 499, 249: 750 to 999, 500 to 749, …"""
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    seen = [set(time_at(ScaledLinear(), low + u * 0.25).tolist()) for low in (0.75, 0.5, 0.25, 0.0)]
    assert [(min(s), max(s), len(s)) for s in seen] == [
        (750, 999, 250), (500, 749, 250), (250, 499, 250), (0, 249, 250),
    ]  # fmt: skip


def test_mixed_noise_is_a_deterministic_step_followed_by_diffusion(
    roles: Roles, rolled: Callable[..., Rollout]
) -> None:
    """x_s = α_s·x + σ_s·ε_θ, then x_t = ρ·x_s + √(σ_t² − ρ²σ_s²)·ε equals α_t·x + σ_t·ε'."""
    hook, rollout = SubIntervalMatching(roles, deterministic=True), rolled(index=1)
    assert rollout.eps is not None
    rng = torch.Generator().manual_seed(0)
    t = 0.5 + 0.25 * torch.rand(8, generator=rng, dtype=torch.float64)
    fresh = torch.randn(8, 1, 8, 8, generator=rng)
    mixed = hook.noise(rollout, "fake", t, fresh)
    a, s = (c[:, None, None, None].float() for c in (1 - t, t))
    x, rho = rollout.samples, a / 0.5
    x_t = rho * (0.5 * x + 0.5 * rollout.eps) + (s**2 - rho**2 * 0.25).sqrt() * fresh
    torch.testing.assert_close(a * x + s * mixed, x_t, rtol=1e-4, atol=1e-5)
    weight = torch.exp(-0.5 * mixed.pow(2).flatten(1).mean(1)) / torch.exp(-0.5 * fresh.pow(2).flatten(1).mean(1))
    snr = ((1 - t) / t).float() ** 2
    expected = weight * snr.clamp_max(5.0) * t.float() ** 2
    torch.testing.assert_close(hook.fake_weight(rollout, t), expected, rtol=1e-4, atol=1e-6)


def test_fresh_noise_stays_fresh_where_nothing_follows(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    t, fresh = torch.full((8,), 0.1, dtype=torch.float64), torch.randn(8, 1, 8, 8)
    last, stochastic = rolled(index=3), rolled(index=1)
    assert SubIntervalMatching(roles, deterministic=True).noise(last, "fake", t, fresh) is fresh
    plain = SubIntervalMatching(roles, deterministic=False, snr_cap=None)
    assert plain.noise(stochastic, "fake", t, fresh) is fresh
    assert torch.equal(plain.fake_weight(stochastic, t), torch.ones(8))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_the_weighted_loss_is_the_bounded_signal_to_noise_times_the_clean_error(prediction: str) -> None:
    schedule: Any = Flow() if prediction == "flow" else ScaledLinear()
    rng = torch.Generator().manual_seed(0)
    t = torch.tensor([0.03, 0.2, 0.5, 0.9, 0.98], dtype=torch.float64) * schedule.t_max
    alpha, sigma = coefficients(schedule, t)
    x, noise, output = torch.randn(3, 5, 6, generator=rng, dtype=torch.float64)
    x_t = alpha[:, None] * x + sigma[:, None] * noise
    estimate = Prediction(*convert(prediction, x_t, output, alpha, sigma), features={})
    native = (output - target_for(prediction, x, noise, alpha, sigma)).pow(2).mean(1)
    clean = (estimate.x0.double() - x).pow(2).mean(1)
    snr = (alpha / sigma) ** 2
    assert float(snr.min()) < 5 < float(snr.max())
    found = min_snr_weight(prediction, alpha, sigma, 5.0) * native
    torch.testing.assert_close(found, snr.clamp_max(5.0) * clean, rtol=1e-4, atol=1e-7)


def test_the_weight_is_finite_in_pure_noise_and_at_the_clean_end() -> None:
    ends: tuple[Tensor, Tensor] = (torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double())
    assert min_snr_weight("epsilon", *ends, 5.0).tolist() == [1.0, 0.0]
    assert min_snr_weight("v", *ends, 5.0).tolist() == [0.0, 0.0]
    assert min_snr_weight("x0", *ends, 5.0).tolist() == [0.0, 5.0]
