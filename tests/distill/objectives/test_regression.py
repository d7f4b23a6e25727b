"""The regression's loss is the distance to the teacher's own ends, and reaches the student alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distill.objectives.features import Perception
from distill.objectives.ode import CLEAN, follow
from distill.objectives.plan import Roles, Rollout
from distill.objectives.regression import OdeRegression
from distill.rewards import DigitClassifier
from distill.sampling import Flow


def hook_of(roles: Roles, seed: int = 0) -> OdeRegression:
    return OdeRegression(roles, weight=0.25, pairs=40, steps=3, guidance=2.0, seed=seed)


def test_loss_is_the_weighted_distance_to_the_teachers_ends(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    hook, rollout, family = hook_of(roles), rolled(), roles.family
    loss = hook.extra_student_loss(rollout)
    loss.backward()
    assert touched() == {"student"}

    index = torch.randint(40, (8,), generator=rollout.random("pairs"))
    condition = family.encode([hook.prompts[int(i)] for i in index])
    times = [*(float(t) for t in family.schedule.grid(3)), CLEAN]
    ends = follow(family, roles.teacher, hook.z[index], condition, times, 2.0)
    t = torch.ones(8, dtype=torch.float64)
    with torch.no_grad():
        flow = roles.student(hook.z[index], timestep=1000 * t.float(), class_labels=condition["labels"]).sample
    torch.testing.assert_close(loss.detach(), 0.25 * (hook.z[index] - flow - ends).pow(2).mean(), rtol=1e-4, atol=1e-6)


def test_the_students_first_step_is_where_its_grid_says(
    roles: Roles, rolled: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's one step is conditioned on t = 399; its pairs are still those of the teacher's whole path."""
    monkeypatch.setattr(roles.family, "schedule", Flow(grids={1: (0.4,)}))
    hook, rollout, family = hook_of(roles), rolled(), roles.family
    index = torch.randint(40, (8,), generator=rollout.random("pairs"))
    condition = family.encode([hook.prompts[int(i)] for i in index])
    ends = follow(family, roles.teacher, hook.z[index], condition, [1.0, 2 / 3, 1 / 3, CLEAN], 2.0)
    with torch.no_grad():
        x = family.predict(roles.student, hook.z[index], torch.full((8,), 0.4, dtype=torch.float64), condition).x0
    expected = 0.25 * (x - ends).pow(2).mean()
    torch.testing.assert_close(hook.extra_student_loss(rollout).detach(), expected, rtol=1e-4, atol=1e-6)


def test_pairs_do_not_depend_on_when_they_are_drawn(roles: Roles) -> None:
    """A resumed run meets the same targets to the last bit."""
    forward, backward = hook_of(roles), hook_of(roles)
    first = [forward.pair(i) for i in (0, 5, 39)]
    second = [backward.pair(i) for i in (39, 5, 0)][::-1]
    for (z, y), (z_again, y_again) in zip(first, second, strict=True):
        assert torch.equal(z, z_again) and torch.equal(y, y_again)
    assert not torch.equal(forward.z, hook_of(roles, seed=1).z)


def test_a_student_that_hits_the_teachers_ends_has_no_loss(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    """With one step of the teacher and no guidance the pairs are the teacher's own first step."""
    roles.student.load_state_dict(roles.teacher.state_dict())
    hook = OdeRegression(roles, weight=1.0, pairs=8, steps=1, guidance=1.0, seed=0)
    assert float(hook.extra_student_loss(rolled()).detach()) < 1e-10


def test_pictures_may_be_compared_in_the_maps_of_a_frozen_network(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = DigitClassifier(8)
    look, plain, rollout = Perception(classifier), hook_of(roles), rolled()
    hook = OdeRegression(roles, weight=0.25, pairs=40, steps=3, guidance=2.0, seed=0, look=look)
    loss = hook.extra_student_loss(rollout)
    loss.backward()
    assert touched(judge=classifier) == {"student"}
    index = torch.randint(40, (8,), generator=rollout.random("pairs")).tolist()
    z, y = (torch.stack(column) for column in zip(*map(plain.pair, index), strict=True))
    condition = roles.family.encode([plain.prompts[i] for i in index])
    with torch.no_grad():
        x = roles.family.predict(roles.student, z, torch.ones(8, dtype=torch.float64), condition).x0
        pictures = (one.expand(-1, 3, -1, -1) for one in (x, y))
        torch.testing.assert_close(loss.detach(), 0.25 * look.distance(*pictures).mean())
