"""DMD2's discriminator: its losses, who learns from which, and R1 at the right point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from distill.config import RecipeError, parse_recipe
from distill.objectives.gan import Adversary, Head, classification
from distill.objectives.plan import Roles, Rollout
from distill.trainer import generator


def vector(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.mark.parametrize(
    ("height", "width", "convolutions"), [(32, 32, 4), (16, 16, 3), (4, 4, 1), (2, 2, 1), (8, 4, 2)]
)
def test_a_head_gives_one_logit_per_map_whatever_its_size(height: int, width: int, convolutions: int) -> None:
    head = Head(16, height, width)
    assert head(torch.randn(3, 16, height, width)).shape == (3,)
    assert sum(isinstance(m, nn.Conv2d) for m in head.modules()) == convolutions


def test_the_student_raises_its_logit_through_frozen_networks(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    adversary, rollout = Adversary(roles, weight=5e-3), rolled()
    rollout.x.retain_grad()
    loss = adversary.extra_student_loss(rollout)
    t, noise = adversary._draw(rollout, "gan-stud", rollout.samples)
    level = t[:, None, None, None].float()
    leaf = rollout.samples.requires_grad_()
    logits = adversary.logits((1 - level) * leaf + level * noise, t, rollout.condition)
    expected = 5e-3 * softplus(-logits).mean()
    torch.testing.assert_close(loss.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(expected, leaf)
    loss.backward()
    assert touched(discriminator=adversary.head) == {"student"}
    assert rollout.x.grad is not None
    torch.testing.assert_close(rollout.x.grad, gradient)


def test_the_students_weight_is_ramped(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    whole, ramped = Adversary(roles, weight=0.1), Adversary(roles, weight=0.1, ramp=10)
    for iteration, share in ((0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0)):
        a, b = (h.extra_student_loss(rolled(iteration=iteration)).detach() for h in (whole, ramped))
        torch.testing.assert_close(b, share * a)


def test_the_fake_scores_network_learns_to_tell_without_the_head(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]]
) -> None:
    adversary, rollout = Adversary(roles, fake_weight=1e-2), rolled()
    loss = adversary.extra_fake_loss(rollout)
    assert loss is not None
    loss.backward()
    assert touched(discriminator=adversary.head) == {"fake"}
    student, real = (adversary.logits(*one) for one in adversary._inputs(rollout))
    torch.testing.assert_close(loss.detach(), (1e-2 * classification(student, real)).detach())
    assert Adversary(roles, fake_weight=0.0).extra_fake_loss(rollout) is None


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_the_discriminators_phase_moves_the_head_alone(
    roles: Roles, rolled: Callable[..., Rollout], touched: Callable[..., set[str]], source: Any
) -> None:
    adversary, rollout = Adversary(roles, source=source, r1=1.0), rolled()
    if source == "fake":
        assert adversary.extra_fake_loss(rollout) is not None
    else:
        assert adversary.extra_fake_loss(rollout) is None
    for parameter in roles.fake.parameters():
        parameter.grad = None
    loss, telemetry = adversary.discriminator_loss(rollout)
    loss.backward()
    assert touched(discriminator=adversary.head) == {"discriminator"}
    assert {"gan/logit_student", "gan/logit_real", "gan/accuracy", "gan/r1"} <= telemetry.keys()


def test_features_of_the_fake_scores_phase_serve_the_head(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    adversary = Adversary(roles)
    kept, fresh = rolled(), rolled()
    adversary.extra_fake_loss(kept)
    assert not any(f.requires_grad for f in kept.cache["gan"])
    losses = [adversary.discriminator_loss(r)[0] for r in (kept, fresh)]
    torch.testing.assert_close(losses[0], losses[1])
    assert kept.cache == {}


def test_real_and_generated_samples_are_noised_apart(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    (x_t, t, _), (y_t, t_real, labels) = Adversary(roles)._inputs(rolled())
    assert not torch.equal(t, t_real) and x_t.shape == y_t.shape
    real, _ = roles.samples.batch(0, 9, 8)
    noise = torch.randn(real.shape, generator=_after_times("gan-real"))
    level = t_real[:, None, None, None].float()
    torch.testing.assert_close(y_t, (1 - level) * real + level * noise)
    assert len(labels["labels"]) == 8


def _after_times(purpose: str) -> torch.Generator:
    rng = generator(7, 0, purpose)
    torch.rand(8, generator=rng, dtype=torch.float64)
    return rng


def test_a_head_learns_to_tell_noise_from_digits(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    """The untrained student's samples are easily told from digits; after some steps the head does."""
    adversary = Adversary(roles, source="teacher")
    optimizer = torch.optim.Adam(adversary.head.parameters(), lr=3e-3)
    losses = []
    for iteration in range(60):
        loss, telemetry = adversary.discriminator_loss(rolled(n=16, iteration=iteration))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:3]) / 3
    assert float(telemetry["gan/logit_real"]) > float(telemetry["gan/logit_student"])


# --- R1 ------------------------------------------------------------------------------------------------------------


class Quadratic(Adversary):
    """D(y_t) = ½·Σ w·y_t², whose gradient w·y_t is known; the head is w."""

    def __init__(self, r1_form: Any, r1_delta: float = 1e-3) -> None:
        self.r1, self.r1_form, self.r1_delta = 1.0, r1_form, r1_delta
        self.head: Any = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))])

    def logits(self, x_t: Any, t: Any, condition: Any) -> torch.Tensor:
        return 0.5 * (self.head[0] * x_t**2).sum(1)  # type: ignore[no-any-return]


def test_exact_r1_is_the_squared_gradient_at_the_noised_real_sample() -> None:
    y_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.zeros(5, dtype=torch.float64)
    adversary = Quadratic("exact")
    penalty = adversary._r1(Rollout(y_t, {}, (), 1, 0), y_t.clone(), t, {})
    w = adversary.head[0]
    expected = (w.detach() * y_t).pow(2).sum(1).mean()
    assert float(penalty.detach()) == pytest.approx(float(expected), rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, (2 * w.detach() * y_t.pow(2)).mean(0), rtol=1e-4, atol=1e-6)


def test_finite_r1_agrees_with_the_exact_one_on_average() -> None:
    y_t = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(4000, 3)
    t, rollout = torch.zeros(4000, dtype=torch.float64), Rollout(y_t, {}, (), 1, 0)
    exact, finite = (float(Quadratic(form)._r1(rollout, y_t.clone(), t, {}).detach()) for form in ("exact", "finite"))
    assert finite == pytest.approx(exact, rel=0.1)


def test_r1_of_the_real_network_reaches_through_its_features(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    """Against central differences of D along the noised real sample."""
    adversary, rollout = Adversary(roles, r1=2.0), rolled(n=2)
    y_t, t, condition = adversary._inputs(rollout)[1]
    penalty = float(adversary._r1(rollout, y_t.clone(), t, condition).detach())
    flat = torch.eye(64)[:, None].reshape(64, 1, 1, 8, 8)
    slopes = torch.zeros(2, 64)
    with torch.no_grad():
        for i, e in enumerate(flat):
            up, down = (adversary.logits(y_t + sign * 1e-2 * e, t, condition) for sign in (1, -1))
            slopes[:, i] = (up - down) / 2e-2
    assert penalty == pytest.approx(float(slopes.pow(2).sum(1).mean()), rel=2e-2)


def test_compiled_blocks_refuse_a_second_backward_pass() -> None:
    """torch.compile's autograd has none (torch 2.12: "does not currently support double backward")."""
    tree = {
        "task": "distill", "name": "toy", "output": "o", "teacher": "t", "iterations": 10, "batch_size": 2,
        "student": {"learning_rate": 1e-4}, "fake": {"learning_rate": 1e-4}, "compile": True,
    }  # fmt: skip
    for gan in ({}, {"r1": 1.0, "r1_form": "finite"}):
        parse_recipe(tree | {"gan": gan})
    parse_recipe(tree | {"gan": {"r1": 1.0}, "compile": False})
    with pytest.raises(RecipeError, match="differentiates twice, which compiled blocks cannot; use finite"):
        parse_recipe(tree | {"gan": {"r1": 1.0}})
