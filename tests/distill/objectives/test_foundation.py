"""The discriminator on frozen features: its losses in float64, who learns from them, and that it learns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from distill.objectives.features import Perception
from distill.objectives.foundation import FoundationAdversary
from distill.objectives.plan import Roles, Rollout
from distill.rewards import DigitClassifier


@pytest.fixture
def adversary(roles: Roles) -> FoundationAdversary:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FoundationAdversary(roles, Perception(DigitClassifier(8)), weight=0.3, width=16)


def logits(adversary: FoundationAdversary, x: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """D by hand: per depth and place a hidden layer, then the mean, in float64."""
    total = np.zeros(len(x))
    maps = adversary.look.maps(x.clamp(-1, 1).expand(-1, 3, -1, -1))
    for features, head in zip(maps, adversary.head.depths, strict=True):
        a, b = ([p.detach().double().numpy() for p in (head[i].weight[:, :, 0], head[i].bias[:, None])] for i in (0, 2))
        hidden = a[0] @ features.detach().double().numpy() + a[1]
        total += (b[0] @ np.where(hidden > 0, hidden, 0.2 * hidden) + b[1]).mean((1, 2)) / len(maps)
    return total


@pytest.mark.parametrize(("steps", "index"), [(4, 1), (4, 3), (1, 0)])
def test_the_student_is_pulled_the_less_the_noisier_its_step(
    roles: Roles,
    rolled: Callable[..., Rollout],
    touched: Callable[..., set[str]],
    adversary: FoundationAdversary,
    steps: int,
    index: int,
) -> None:
    rollout = rolled(steps=steps, index=index)
    loss = adversary.extra_student_loss(rollout)
    loss.backward()
    weight = (1 - float(roles.family.schedule.grid(steps)[index])) ** 2
    expected = -0.3 * weight * logits(adversary, rollout.samples).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert touched(head=adversary.head, tower=adversary.look.network) == {"student"}
    gradients = [p.grad for p in roles.student.parameters() if p.grad is not None]
    assert (max(float(g.abs().max()) for g in gradients) > 0) == (weight > 0)


def test_the_heads_learn_a_hinge_loss_alone(
    rolled: Callable[..., Rollout], touched: Callable[..., set[str]], adversary: FoundationAdversary
) -> None:
    rollout = rolled()
    loss, telemetry = adversary.discriminator_loss(rollout)
    loss.backward()
    student, real = logits(adversary, rollout.samples), logits(adversary, rollout.real()[0])
    expected = np.maximum(0, 1 + student).mean() + np.maximum(0, 1 - real).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert touched(head=adversary.head, tower=adversary.look.network) == {"head"}
    assert adversary.extra_fake_loss(rollout) is None
    assert float(telemetry["gan/logit_real"]) == pytest.approx(real.mean(), rel=1e-4)


def test_heads_learn_to_tell_noise_from_digits(rolled: Callable[..., Rollout], adversary: FoundationAdversary) -> None:
    optimizer = torch.optim.Adam(adversary.head.parameters(), lr=3e-2)
    for iteration in range(40):
        loss, telemetry = adversary.discriminator_loss(rolled(n=16, iteration=iteration))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(telemetry["gan/logit_real"]) > 0.1 > -0.1 > float(telemetry["gan/logit_student"])
    assert float(telemetry["gan/accuracy"]) > 0.7


def test_its_strength_grows_over_the_ramp(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook = FoundationAdversary(roles, Perception(DigitClassifier(8)), weight=0.3, ramp=10)
    rollout = rolled()
    full = FoundationAdversary(roles, hook.look, weight=0.3)
    assert float(hook.extra_student_loss(rollout).detach()) == pytest.approx(
        0.1 * float(full.extra_student_loss(rollout).detach())
    )
