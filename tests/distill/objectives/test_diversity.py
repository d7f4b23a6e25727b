"""DP-DMD's anchor: its target is the teacher's mean velocity, and it replaces matching on the first step alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.objectives.diversity import FirstStepAnchor
from distill.objectives.ode import CLEAN, follow
from distill.objectives.plan import Roles, Rollout

NONE: Any = None


@pytest.mark.parametrize(("anchor", "steps"), [(2, 6), (3, 3)])
def test_the_loss_is_the_papers_in_velocities(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]], anchor: int, steps: int
) -> None:
    """λ·‖v_θ(x_1) − (x_1 − z_k)/(1 − t_k)‖² with z_k after k guided Euler steps of the teacher."""
    hook = FirstStepAnchor(roles, weight=0.05, anchor=anchor, steps=steps, guidance=2.5)
    rollout = rolled(steps=4, index=0)
    assert rollout.start is not None and rollout.eps is not None
    grid = [*(float(t) for t in roles.family.schedule.grid(steps)), CLEAN]
    z = follow(roles.family, roles.teacher, rollout.start, rollout.condition, grid[: anchor + 1], 2.5)
    t_k = 0.0 if anchor == steps else 1 - anchor / steps
    velocity = rollout.eps - rollout.samples
    expected = 0.05 * (velocity - (rollout.start - z) / (1 - t_k)).pow(2).mean()
    loss = hook.extra_student_loss(rollout)
    assert loss is not None
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-7)
    loss.backward()
    assert touched() == {"student"}


def test_the_first_step_is_anchored_and_the_others_are_matched(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook = FirstStepAnchor(roles, weight=0.05, anchor=1, steps=4, guidance=1.0)
    assert hook.student_weights(rolled(index=0), NONE)[1].sum() == 0
    assert hook.student_weights(rolled(index=2), NONE)[0].tolist() == [1.0] * 8
    assert hook.extra_student_loss(rolled(index=2)) is None
    # A student of one step has no later step that could be matched.
    assert hook.student_weights(rolled(steps=1, index=0), NONE)[1].tolist() == [1.0] * 8
    both = FirstStepAnchor(roles, weight=0.05, anchor=1, steps=4, guidance=1.0, matching=True)
    assert both.student_weights(rolled(index=0), NONE)[1].tolist() == [1.0] * 8
