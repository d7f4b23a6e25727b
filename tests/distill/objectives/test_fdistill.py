"""The weight h(r) = f''(r)·r² of each divergence, and its running means."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.objectives.dmd import match, student_loss
from distill.objectives.fdistill import WEIGHTS, DivergenceWeight
from distill.objectives.gan import Adversary
from distill.objectives.plan import Hook, Matching, Roles, Rollout

GENERATORS: dict[str, Callable[[float], float]] = {
    "reverse-kl": lambda r: -log(r),
    "forward-kl": lambda r: r * log(r),
    "jensen-shannon": lambda r: r * log(r) - (r + 1) * log((r + 1) / 2),
    "softened-reverse-kl": lambda r: (r + 1) * log((r + 1) / r),
    "squared-hellinger": lambda r: (1 - r**0.5) ** 2,
    "jeffreys": lambda r: (r - 1) * log(r),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weight_is_the_second_derivative_of_the_divergences_generator(kind: str) -> None:
    """D_f(p‖q) = E_q[f(p/q)]; both sides up to one constant factor, fixed at r = 1."""
    f, h = GENERATORS[kind], WEIGHTS[kind]
    ratios, step = np.array([0.2, 0.5, 1.0, 2.0, 6.0]), 1e-4
    curvature = np.array([(f(r + step) - 2 * f(r) + f(r - step)) / step**2 for r in ratios])
    expected = curvature * ratios**2
    found = h(torch.from_numpy(ratios)).numpy()
    np.testing.assert_allclose(found / found[2], expected / expected[2], rtol=1e-4)


def world(roles: Roles, kind: str = "jensen-shannon", **changes: Any) -> tuple[Adversary, DivergenceWeight]:
    adversary = Adversary(roles, source="teacher")
    return adversary, DivergenceWeight(roles, adversary, divergence=kind, **changes)


def matched(roles: Roles, rollout: Rollout) -> Matching:
    rng = torch.Generator().manual_seed(0)
    t = torch.tensor([0.05, 0.15, 0.15, 0.35, 0.55, 0.65, 0.95, 0.98], dtype=torch.float64)
    with torch.no_grad():
        return match(
            roles.family, roles.teacher, roles.fake, rollout, t, torch.randn(8, 1, 8, 8, generator=rng), guidance=2.0
        )


def test_both_displacements_get_h_of_the_discriminators_ratio(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    adversary, hook = world(roles)
    with torch.no_grad():
        adversary.head.body[-1].bias.add_(0.7)
    rollout = rolled()
    matching = matched(roles, rollout)
    alpha, beta = hook.student_weights(rollout, matching)
    with torch.no_grad():
        r = adversary.logits(matching.x_t, matching.t, rollout.condition).exp()
    torch.testing.assert_close(alpha, (r / (1 + r)).clamp(0.1 / 1.1, 20 / 21))
    assert torch.equal(alpha, beta) and not alpha.requires_grad


def test_ratios_are_divided_by_their_running_mean_per_time(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    adversary, hook = world(roles, "forward-kl", decay=0.5)
    with torch.no_grad():
        adversary.head.body[-1].bias.add_(1.0)
    rollout = rolled()
    matching = matched(roles, rollout)
    raw, _ = hook.student_weights(rollout, matching)
    hook.after_iteration([rollout])
    means = hook.memory.get_buffer("ratio")
    expected = torch.ones(10)
    for row, own in ((0, [0]), (1, [1, 2]), (3, [3]), (5, [4]), (6, [5]), (9, [6, 7])):
        expected[row] = 0.5 + 0.5 * raw[own].mean()
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(hook.memory.get_buffer("level"), (0.5 + 0.5 * raw.mean()).reshape(1))
    again, _ = hook.student_weights(rolled(), matching)
    bins = torch.tensor([0, 1, 1, 3, 5, 6, 9, 9])
    torch.testing.assert_close(again, raw / expected[bins] / (0.5 + 0.5 * raw.mean()))


def test_micro_batches_leave_the_memory_of_the_batch(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    memories = []
    for rows in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        _, hook = world(roles)
        rollouts = []
        for own in rows:
            rollout, matching = rolled(), matched(roles, rolled())
            rollout.condition = {"labels": rollout.condition["labels"][own]}
            for name in ("t", "x_t"):
                setattr(matching, name, getattr(matching, name)[own])
            hook.student_weights(rollout, matching)
            rollouts.append(rollout)
        hook.after_iteration(rollouts)
        memories.append(hook.memory.state_dict())
    for name in memories[0]:
        torch.testing.assert_close(memories[0][name], memories[1][name], rtol=1e-5, atol=1e-6)


def test_reverse_kl_is_dmd_to_the_last_bit(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    rng = torch.Generator().manual_seed(0)
    t, noise = 0.1 + 0.8 * torch.rand(8, generator=rng, dtype=torch.float64), torch.randn(8, 1, 8, 8, generator=rng)
    _, hook = world(roles, "reverse-kl")

    def gradient(hooks: list[Hook]) -> Tensor:
        rollout = rolled()
        rollout.x.retain_grad()
        student_loss(roles.family, roles.teacher, roles.fake, rollout, t, noise, guidance=3.0, hooks=hooks)[
            0
        ].backward()
        assert rollout.x.grad is not None
        return rollout.x.grad

    assert torch.equal(gradient([hook]), gradient([]))
