"""A small world of the real classes for the hooks: digits, and diffusion transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import SitModel
from distill.families.sit import Sit
from distill.objectives.plan import Roles, Rollout, fraction_of
from distill.tasks.samples import DigitSamples
from distill.trainer import generator


def random_network(family: Sit, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = family.new_network()
        with torch.no_grad():
            for parameter in network.parameters():  # DiT starts at zero, which would hide most terms
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.train()


@pytest.fixture
def roles() -> Roles:
    """A frozen teacher, a student and a fake score, all different."""
    family = Sit(SitModel(family="sit", width=16, layers=2, heads=2))
    teacher, student, fake = (random_network(family, seed) for seed in (1, 2, 3))
    return Roles(family, teacher.eval().requires_grad_(False), student, fake, DigitSamples(0))


@pytest.fixture
def rolled(roles: Roles) -> Callable[..., Rollout]:
    """A rollout of the student at some step of some grid: rolled(steps=4, index=1, n=8, iteration=0)."""

    def make(steps: int = 4, index: int = 1, n: int = 8, iteration: int = 0, **changes: Any) -> Rollout:
        family = roles.family
        prompts = roles.samples.conditions(iteration, 0, n)
        condition = family.encode(prompts)
        grid = [float(t) for t in family.schedule.grid(steps)]
        start = torch.randn(n, *family.latent_shape(), generator=generator(5, iteration, "start"))
        times = torch.full((n,), grid[index], dtype=torch.float64)
        prediction = family.predict(roles.student, start, times, condition)
        levels = [fraction_of(family.schedule, t) for t in grid] + [0.0]
        rollout = Rollout(
            prediction.x0,
            condition,
            prompts,
            steps,
            index,
            start=start,
            t=grid[index],
            level=levels[index],
            until=levels[index + 1],
            eps=prediction.eps.detach(),
            iteration=iteration,
            random=lambda purpose: generator(7, iteration, purpose),
            real=lambda: real(n),
        )
        return replace(rollout, **changes)

    def real(n: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = roles.samples.batch(0, 9, n)
        return x, roles.family.encode(labels)

    return make


@pytest.fixture
def touched(roles: Roles) -> Callable[..., set[str]]:
    """Names of the networks whose parameters have a gradient; keywords name further modules."""

    def names(**more: Any) -> set[str]:
        modules = {"teacher": roles.teacher, "student": roles.student, "fake": roles.fake, **more}
        return {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}

    return names
