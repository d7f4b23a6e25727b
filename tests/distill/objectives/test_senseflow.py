"""SenseFlow's formulas: the fake score follows the student, and both paths through a segment must meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from distill.objectives.plan import Roles, Rollout
from distill.objectives.senseflow import ImplicitAlignment, IntraSegmentGuidance


def weights(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_the_fake_score_takes_its_share_of_the_student(roles: Roles) -> None:
    fake, student, teacher = weights(roles.fake), weights(roles.student), weights(roles.teacher)
    ImplicitAlignment(roles, 0.97).after_student_step()
    torch.testing.assert_close(weights(roles.fake), 0.97 * fake + 0.03 * student)
    assert torch.equal(weights(roles.student), student) and torch.equal(weights(roles.teacher), teacher)
    assert all(p.requires_grad for p in roles.fake.parameters())


@pytest.mark.parametrize(("index", "t", "s"), [(1, 0.75, 0.5), (3, 0.25, 0.0)])
def test_the_loss_is_the_papers_for_flows(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]], index: int, t: float, s: float
) -> None:
    """x_s = x_t + (s − t)·v_θ(x_t) against x_m + (s − m)·v_θ(x_m), x_m = x_t + (m − t)·v_teacher(x_t), pseudo-Huber."""
    hook, rollout = IntraSegmentGuidance(roles, weight=0.5, guidance=2.0), rolled(index=index)
    loss = hook.extra_student_loss(rollout)
    assert loss is not None and rollout.start is not None and rollout.eps is not None

    u = torch.rand(1, generator=rollout.random("segment"), dtype=torch.float64).item()
    m = s + 0.05 + u * (t - s - 0.1)
    labels, x = rollout.condition["labels"], rollout.start

    def velocity(network: nn.Module, x: torch.Tensor, time: float, labels: torch.Tensor) -> torch.Tensor:
        return network(x, timestep=torch.full((8,), 1000 * time), class_labels=labels).sample  # type: ignore[no-any-return]

    with torch.no_grad():
        conditional, empty = (velocity(roles.teacher, x, t, c) for c in (labels, torch.full((8,), 10)))
        x_m = x + (m - t) * (empty + 2.0 * (conditional - empty))
        target = x_m + (s - m) * velocity(roles.student, x_m, m, labels)
    direct = x + (s - t) * velocity(roles.student, x, t, labels)
    expected = 0.5 * (((direct - target) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert touched() == {"student"}
    weight = roles.student.proj_out_2.weight  # the path through the middle is a target, so it has no gradient
    (gradient,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_a_segment_narrower_than_its_margins_is_left_alone(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    assert IntraSegmentGuidance(roles, weight=0.5, guidance=2.0).extra_student_loss(rolled(steps=16)) is None
