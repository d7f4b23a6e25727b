"""The real teacher's share of the fake score, in weights and over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distill.objectives.dmd import match
from distill.objectives.plan import Roles, Rollout
from distill.objectives.weak_to_strong import SharedTeacher


def test_a_share_of_the_difference_is_a_share_of_a_lora() -> None:
    """With φ = θ + B·A the shared teacher is the teacher whose LoRA is scaled by the share."""
    rng = torch.Generator().manual_seed(0)
    teacher, fake = nn.Linear(6, 5), nn.Linear(6, 5)
    down, up, x = torch.randn(2, 6, generator=rng), torch.randn(5, 2, generator=rng), torch.randn(3, 6, generator=rng)
    fake.load_state_dict({"weight": teacher.weight.detach() + up @ down, "bias": teacher.bias.detach()})
    nothing: Any = None
    hook = SharedTeacher(Roles(nothing, teacher, nothing, fake), share=0.25)
    shared = hook.teacher(Rollout(x, {}, (), 1, 0), teacher)
    torch.testing.assert_close(shared(x), teacher(x) + 0.25 * x @ down.T @ up.T)


def test_the_share_is_annealed_along_a_cosine_and_the_teacher_itself_remains(
    roles: Roles, rolled: Callable[..., Rollout]
) -> None:
    hook = SharedTeacher(roles, share=0.375, anneal=100)
    assert [hook.weight(i) for i in (0, 50, 100, 5000)] == pytest.approx([0.375, 0.1875, 0.0, 0.0])
    assert hook.teacher(rolled(iteration=100), roles.teacher) is roles.teacher
    assert SharedTeacher(roles, share=0.25).weight(10_000) == 0.25


def test_the_share_follows_the_fake_score_and_changes_no_role(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    before = [nn.utils.parameters_to_vector(m.parameters()).clone() for m in (roles.teacher, roles.fake)]
    hook = SharedTeacher(roles, share=0.5)
    for iteration in (0, 1):
        shared = hook.teacher(rolled(iteration=iteration), roles.teacher)
        expected = 0.5 * sum(nn.utils.parameters_to_vector(m.parameters()) for m in (roles.teacher, roles.fake))
        torch.testing.assert_close(nn.utils.parameters_to_vector(shared.parameters()), expected)
        assert not any(p.requires_grad for p in shared.parameters())
        if iteration == 0:
            after = [nn.utils.parameters_to_vector(m.parameters()) for m in (roles.teacher, roles.fake)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            with torch.no_grad():
                next(iter(roles.fake.parameters())).add_(1.0)


@torch.no_grad()
def test_a_whole_share_leaves_no_displacement(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    """Where teacher and fake score agree, matching has nothing to say: what a share takes away."""
    rng = torch.Generator().manual_seed(0)
    t, noise = 0.1 + 0.8 * torch.rand(8, generator=rng, dtype=torch.float64), torch.randn(8, 1, 8, 8, generator=rng)
    norms = []
    for share in (0.0, 0.5, 0.999):
        hooks = [SharedTeacher(roles, share=share)]
        found = match(roles.family, roles.teacher, roles.fake, rolled(), t, noise, guidance=1.0, hooks=hooks)
        norms.append(float(found.dm.norm()))
    assert norms[0] > norms[1] > norms[2] and norms[2] < 0.01 * norms[0]
