"""Every hook on the sdxl family with v-prediction, whose last timestep is pure noise: nothing may divide by α = 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import parse_recipe
from distill.families.base import coefficients
from distill.families.sdxl import Sdxl
from distill.objectives.build import hooks_of
from distill.objectives.dmd import fake_loss, student_loss
from distill.objectives.gan import Adversary
from distill.objectives.plan import Roles, Rollout, fraction_of
from distill.sampling import ScaledLinear
from distill.telemetry.sink import Some
from distill.trainer import generator

PROMPTS = ["a small red metal sphere", "a large blue cube"]


class Captions:
    """Real samples are noise here; only their shapes and conditions matter."""

    def conditions(self, iteration: int, micro: int, size: int) -> list[str]:
        return (PROMPTS * size)[:size]


@pytest.fixture
def roles(tiny_sources: Path) -> Roles:
    family, network = Sdxl.from_folder(tiny_sources)
    family.prediction, family.schedule = "v", ScaledLinear(zero_terminal=True)
    student, fake = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in [*student.parameters(), *fake.parameters()]:
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return Roles(family, network.eval().requires_grad_(False), student.train(), fake.train(), Captions())


class Reward:
    """The mean colour: differentiable, and scored from pixels."""

    def score_pixels(self, pixels: Tensor, conditions: Any) -> Tensor:
        return pixels.mean((1, 2, 3))


def test_the_first_step_is_trained_from_pure_noise_by_every_hook(roles: Roles) -> None:
    recipe = parse_recipe({
        "task": "distill", "name": "toy", "output": "o", "teacher": "t", "iterations": 10, "batch_size": 2,
        "student": {"learning_rate": 1e-4}, "fake": {"learning_rate": 1e-4}, "sampler": "deterministic",
        "advantage": {"reward": "r", "group": 2}, "adaptation": {}, "sharpening": {}, "decoupled": {},
        "sub_interval": {},
        "regression": {"pairs": 2, "steps": 2}, "gan": {"r1": 1.0}, "divergence": {}, "reward_weighting": {},
        "reward_gradient": {}, "reward_tilt": {"beta": 1.0}, "shared_teacher": {}, "segment_guidance": {},
        "consistency": {},
        "first_step_anchor": {"anchor": 1, "steps": 3, "matching": True},
        "safeguards": {"guidance_ceiling": 1.5, "coherence": 0.0, "two_key": 1},
    })  # fmt: skip
    family, hooks = roles.family, hooks_of(recipe, roles, Reward())
    condition = family.encode(PROMPTS)
    start = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    prediction = family.predict(roles.student, start, torch.full((2,), 999.0, dtype=torch.float64), condition)
    t = torch.full((2,), 999.0, dtype=torch.float64)
    rollout = Rollout(
        prediction.x0,
        condition,
        PROMPTS,
        4,
        0,
        start=start,
        t=999.0,
        level=fraction_of(family.schedule, 999.0),
        until=fraction_of(family.schedule, 749.0),
        eps=prediction.eps.detach(),
        advantage=lambda: torch.tensor([-1.0, 1.0]),
        rewards=lambda: torch.tensor([0.1, 0.2]),
        random=lambda purpose: generator(0, 0, 0, purpose),
        renoise=lambda rollout, rng: (t, torch.randn(rollout.x.shape, generator=rng)),
        real=lambda: (torch.randn(2, *family.latent_shape()), condition),
    )
    assert float(coefficients(family.schedule, t)[0].max()) == 0.0
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    for hook in hooks:
        noise = hook.noise(rollout, "fake", t, noise)
    networks = (family, roles.teacher, roles.fake)
    ca = (torch.full((2,), 300.0, dtype=torch.float64), torch.randn(start.shape))
    loss, telemetry = student_loss(*networks, rollout, t, noise, guidance=3.0, hooks=hooks, ca=ca)
    loss.backward()
    assert {"regression", "anchor", "segment", "gan/student", "tilt_norm", "f_weight"} <= rollout.telemetry.keys()
    rollout.x = rollout.x.detach()
    other, more = fake_loss(family, roles.fake, rollout, t, noise, hooks=hooks)
    other.backward()
    adversary = next(hook for hook in hooks if isinstance(hook, Adversary))
    third, last = adversary.discriminator_loss(rollout)
    third.backward()
    told = (telemetry | more | last | rollout.telemetry).values()
    logged = [v.values if isinstance(v, Some) else torch.as_tensor(v) for v in told]
    assert all(bool(v.isfinite().all()) for v in (loss, other, third, *logged))
    for module in (roles.student, roles.fake, adversary.head):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert gradients and all(bool(g.isfinite().all()) for g in gradients)
        assert max(float(g.abs().max()) for g in gradients) > 0
