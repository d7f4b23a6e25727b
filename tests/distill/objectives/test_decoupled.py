"""D-DMD re-noises guidance between clean and the student's step, and nothing else apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distill.objectives.decoupled import DecoupledRenoising
from distill.objectives.dmd import match, student_loss
from distill.objectives.plan import Roles, Rollout


@pytest.mark.parametrize(("index", "level"), [(0, 1.0), (1, 0.75), (3, 0.25)])
def test_guidance_is_renoised_below_the_students_step(rolled: Callable[..., Rollout], index: int, level: float) -> None:
    hook, rollout = DecoupledRenoising(), rolled(index=index, n=2)
    rollout.x = torch.zeros(4000, 1)
    found = hook.times(rollout, "ca", torch.Generator().manual_seed(0), 0.02, 0.98)
    assert found is not None and found.dtype == torch.float64
    top = min(level, 0.98)
    assert 0.02 <= float(found.min()) < 0.03 and top - 0.01 < float(found.max()) <= top
    assert float(found.mean()) == pytest.approx((0.02 + top) / 2, abs=0.015)
    for part in ("dm", "fake"):
        assert hook.times(rollout, part, torch.Generator(), 0.0, 1.0) is None  # type: ignore[arg-type]


def test_both_parts_at_one_point_are_the_coupled_update(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    rng = torch.Generator().manual_seed(0)
    t, noise = 0.1 + 0.8 * torch.rand(8, generator=rng, dtype=torch.float64), torch.randn(8, 1, 8, 8, generator=rng)
    losses = [
        student_loss(roles.family, roles.teacher, roles.fake, rolled(), t, noise, guidance=4.0, ca=ca)[0].detach()
        for ca in (None, (t, noise))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0.0)


@torch.no_grad()
def test_each_displacement_comes_from_its_own_point(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    rng = torch.Generator().manual_seed(1)
    t, t_ca = 0.1 + 0.8 * torch.rand(2, 8, generator=rng, dtype=torch.float64)
    noise, noise_ca = torch.randn(2, 8, 1, 8, 8, generator=rng)
    networks, rollout = (roles.family, roles.teacher, roles.fake), rolled()
    apart = match(*networks, rollout, t, noise, guidance=4.0, ca=(t_ca, noise_ca))
    at_dm, at_ca = (match(*networks, rollout, *draw, guidance=4.0) for draw in ((t, noise), (t_ca, noise_ca)))
    torch.testing.assert_close(apart.dm, at_dm.dm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.ca, at_ca.ca, rtol=1e-4, atol=1e-5)
    guided = apart.x_c + 3.0 * apart.ca
    torch.testing.assert_close(apart.scale, (rollout.samples - guided).abs().flatten(1).mean(1))
