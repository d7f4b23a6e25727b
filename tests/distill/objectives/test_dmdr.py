"""DMDR's reward gradient and its annealed noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import beta as beta_distribution
from torch import Tensor

from distill.objectives.dmdr import BetaRenoising, RewardGradient, reward_of
from distill.objectives.plan import Roles, Rollout
from distill.rewards import DigitClassifier


@pytest.fixture
def classifier() -> DigitClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitClassifier(8).eval().requires_grad_(False)


def test_the_gradient_is_the_rewards_and_reaches_the_student_alone(
    roles: Roles, rolled: Callable[..., Rollout], classifier: DigitClassifier, touched: Callable[..., set[str]]
) -> None:
    """Central differences of −λ·mean log p(label | clip(x)) along a random direction."""
    hook, rollout = RewardGradient(roles, classifier, weight=0.05), rolled()
    rollout.x = rollout.x * 0.3
    rollout.x.retain_grad()
    loss = hook.extra_student_loss(rollout)
    assert loss is not None
    loss.backward()
    assert touched(reward=classifier) == {"student"} and rollout.x.grad is not None
    direction = torch.randn(rollout.x.shape, generator=torch.Generator().manual_seed(1))

    def value(step: float) -> float:
        pixels = (rollout.samples + step * direction).clamp(-1, 1).expand(-1, 3, -1, -1)
        return -0.05 * float(classifier.score_pixels(pixels, rollout.prompts).double().mean())

    assert value(0.0) == pytest.approx(float(loss.detach()), rel=1e-5)
    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    assert float((rollout.x.grad * direction).sum()) == pytest.approx(slope, rel=2e-2)


def test_pixels_beyond_the_pictures_range_are_not_pushed_further(
    roles: Roles, rolled: Callable[..., Rollout], classifier: DigitClassifier
) -> None:
    leaf = torch.full((8, 1, 8, 8), 1.5, requires_grad=True)
    reward_of(roles.family, classifier, leaf, rolled()).sum().backward()
    assert leaf.grad is not None and float(leaf.grad.abs().max()) == 0.0


def test_a_cold_start_has_no_reward(roles: Roles, rolled: Callable[..., Rollout], classifier: DigitClassifier) -> None:
    hook = RewardGradient(roles, classifier, weight=0.05, start=10)
    assert hook.extra_student_loss(rolled(iteration=9)) is None
    assert hook.extra_student_loss(rolled(iteration=10)) is not None


def test_rewards_and_gradients_that_are_not_finite_count_as_nothing(
    roles: Roles, rolled: Callable[..., Rollout]
) -> None:
    class Broken:
        def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
            return torch.cat((pixels[:1].mean((1, 2, 3)) / 0.0, pixels[1:].mean((1, 2, 3))))

    rollout = rolled()
    rollout.x.retain_grad()
    loss = RewardGradient(roles, Broken(), weight=1.0).extra_student_loss(rollout)
    assert loss is not None and bool(loss.isfinite())
    loss.backward()
    assert rollout.x.grad is not None
    assert float(rollout.x.grad[0].abs().max()) == 0.0 and float(rollout.x.grad[1].abs().max()) > 0


@pytest.mark.parametrize(("iteration", "a", "b"), [(0, 4.0, 1.5), (50, 2.5, 1.25), (100, 1.0, 1.0), (999, 1.0, 1.0)])
def test_times_follow_the_annealed_beta_distribution(
    rolled: Callable[..., Rollout], iteration: int, a: float, b: float
) -> None:
    rollout = rolled(n=2, iteration=iteration)
    rollout.x = torch.zeros(4000, 1)
    hook = BetaRenoising(a=4.0, b=1.5, anneal=100)
    rng = torch.Generator().manual_seed(0)
    found = hook.times(rollout, "dm", rng, 0.02, 0.98)
    assert found is not None and float(found.min()) >= 0.02 and float(found.max()) <= 0.98
    unit = ((found - 0.02) / 0.96).numpy()
    expected = beta_distribution(a, b)
    assert unit.mean() == pytest.approx(expected.mean(), abs=0.012)
    assert unit.std() == pytest.approx(expected.std(), abs=0.012)
    assert hook.times(rollout, "fake", rng, 0.0, 1.0) is not None
    assert hook.times(rollout, "ca", rng, 0.0, 1.0) is None
