"""The teacher's deterministic steps against the samplers that bundles ship, and the target that replaces several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.families.base import coefficients
from distill.math import ode_target
from distill.objectives.ode import CLEAN, follow, noise_level
from distill.objectives.plan import Roles
from distill.sampling import Flow, ScaledLinear, noise, ode_table
from distill.tasks.diffusion import sample


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_following_the_teacher_is_its_own_sampler(roles: Roles, guidance: float) -> None:
    family, condition = roles.family, roles.family.encode([3, 7])
    seeds = [4, 5]
    start = torch.stack([torch.from_numpy(noise(s, 0, family.latent_shape())[0]) for s in seeds])
    table = ode_table(family.schedule, family.prediction, 6)
    expected = sample(family, roles.teacher, table, condition, seeds, guidance)
    times = [*(float(t) for t in family.schedule.grid(6)), CLEAN]
    found = follow(family, roles.teacher, start, condition, times, guidance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    halves = follow(family, roles.teacher, start, condition, times[:4], guidance)
    torch.testing.assert_close(follow(family, roles.teacher, halves, condition, times[3:], guidance), found)


def test_the_clean_end_has_no_noise(roles: Roles) -> None:
    assert [c.tolist() for c in noise_level(roles.family, CLEAN, torch.empty(2))] == [[1, 1], [0, 0]]
    assert [c.tolist() for c in noise_level(roles.family, 0.25, torch.empty(1))] == [[0.75], [0.25]]


@pytest.mark.parametrize("schedule", [Flow(), ScaledLinear(), ScaledLinear(zero_terminal=True)])
def test_one_step_with_the_target_leads_where_the_path_led(schedule: Flow | ScaledLinear) -> None:
    """Also from pure noise, where α = 0 and no noise estimate could be divided by it."""
    rng = torch.Generator().manual_seed(0)
    x_t, x_s = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    t = torch.full((3,), schedule.t_max, dtype=torch.float64)
    s = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64) * schedule.t_max
    (a_t, s_t), (a_s, s_s) = coefficients(schedule, t.floor()), coefficients(schedule, s)
    if isinstance(schedule, Flow):
        a_t, s_t = coefficients(schedule, t)
    x0 = ode_target(x_t, x_s, (a_t, s_t), (a_s, s_s))
    eps = (x_t - a_t[:, None] * x0) / s_t[:, None]
    torch.testing.assert_close(a_s[:, None] * x0 + s_s[:, None] * eps, x_s)
    if isinstance(schedule, Flow):
        velocity = (x_t - x_s) / (1 - s)[:, None]
        np.testing.assert_allclose((eps - x0).numpy(), velocity.numpy())
