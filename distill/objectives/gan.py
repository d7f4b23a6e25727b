"""DMD2's adversarial loss on real data (arXiv 2405.14867, §4.3), as a hook and a role ``discriminator``.

D(x_t, t, c) is a small head on the features of the fake score's network at re-noised samples; real latents and
student samples are noised at independent times, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from distill.families.base import Condition, coefficients
from distill.math import add_noise
from distill.objectives.plan import Hook, Roles, Rollout, Telemetry, Terms, routed, time_at
from distill.parallel.device import device, normal, uniform


class Head(nn.Module):
    """Feature maps (B, C, h, w) to logits (B,): strided convolutions down to at most 4 × 4, then one over what is left.

    DMD2 has four on SDXL's 32 × 32 map of 1280 channels; here their number follows from the map.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(gcd(32, channels), channels), nn.SiLU()]
            height, width = height // 2, width // 2
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, 1, (height, width)))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features).flatten()  # type: ignore[no-any-return]


class Adversary(Hook):
    """Student: g·softplus(−D(x)). Head: softplus(D(x)) + softplus(−D(y)) + (γ/2)·‖∇_{y_t}D(y_t)‖². Fake: b· the same.

    g = 5e-3 and b = 1e-2 are SDXL's in the reference (high confidence), which trains the network under the head with
    the classification as well; b = 0 trains the head alone. source "teacher" reads the frozen teacher instead.
    ramp: iterations in which g grows from 0, because the first logits of a fresh head mean nothing.
    R1 (γ; DMD2 has none) is taken at the real noised input y_t itself: "exact" by a second backward pass, "finite" as
    E[(D(y_t + δ·u) − D(y_t))²]/δ² with u ∼ N(0, 1), the same in the limit. Perturbing a less noised y at the same t,
    as some public code does, measures how D reacts to another noise level instead.
    """

    terms = Terms(extra="GAN on real data")

    head: nn.Module

    def __init__(
        self,
        roles: Roles,
        *,
        weight: float = 5e-3,
        fake_weight: float = 1e-2,
        source: Literal["fake", "teacher"] = "fake",
        tap: str = "mid",
        ramp: int = 0,
        r1: float = 0.0,
        r1_form: Literal["exact", "finite"] = "exact",
        r1_delta: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.roles, self.weight, self.tap, self.ramp = roles, weight, tap, ramp
        self.network = roles.fake if source == "fake" else roles.teacher
        self.backbone_weight = fake_weight if source == "fake" else 0.0
        self.r1, self.r1_form, self.r1_delta = r1, r1_form, r1_delta
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(*self._shape()).to(device())

    def _shape(self) -> tuple[int, ...]:
        """Of the tapped features, from a pass of the teacher, which is alike.

        On the meta device in float32: real weights may be in bfloat16, wait on the host, or not be there yet.
        """
        family, teacher = self.roles.family, self.roles.teacher
        x = torch.zeros(1, *family.latent_shape(), device="meta")
        t = torch.zeros(1, dtype=torch.float64, device="meta")
        condition = {name: rows.to("meta") for name, rows in family.unconditional(1).items()}
        held = getattr(teacher, "base", teacher)
        one = _Pass(held, lambda: family.predict(teacher, x, t, condition, taps=(self.tap,)))
        shadows = {
            name: torch.empty_like(tensor, dtype=torch.float32 if tensor.is_floating_point() else None, device="meta")
            for name, tensor in chain(one.named_parameters(), one.named_buffers())
        }
        return tuple(functional_call(one, shadows, ()).features[self.tap].shape[1:])

    def extra_student_loss(self, rollout: Rollout) -> Tensor:
        leaf = rollout.samples.requires_grad_()
        t, noise = self._draw(rollout, "gan-stud", leaf)
        logits = self.head(self._features(self._noised(leaf, t, noise), t, rollout.condition))
        loss = softplus(-logits.float()).mean()
        rollout.telemetry["gan/student"] = loss.detach()
        strength = self.weight * min(1.0, (rollout.iteration + 1) / self.ramp) if self.ramp else self.weight
        return routed(strength * loss, [leaf], [rollout.x])

    def extra_fake_loss(self, rollout: Rollout) -> Tensor | None:
        if not self.backbone_weight:
            return None
        pairs = [self._features(x_t, t, condition) for x_t, t, condition in self._inputs(rollout)]
        rollout.cache["gan"] = [features.detach() for features in pairs]
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        student, real = (functional_call(self.head, frozen, (features,)) for features in pairs)
        return self.backbone_weight * classification(student, real)

    def discriminator_loss(self, rollout: Rollout) -> tuple[Tensor, Telemetry]:
        """The head's loss; the features are those of the fake score's phase where it had them."""
        inputs = self._inputs(rollout)
        cached = rollout.cache.pop("gan", None)
        if cached is None:
            with torch.no_grad():
                cached = [self._features(*one) for one in inputs]
        student, real = (self.head(features) for features in cached)
        loss = classification(student, real)
        telemetry: Telemetry = {
            "gan/logit_student": student.detach().mean(),
            "gan/logit_real": real.detach().mean(),
            "gan/accuracy": 0.5 * ((student < 0).float().mean() + (real > 0).float().mean()),
        }
        if self.r1:
            penalty = self._r1(rollout, *inputs[1])
            telemetry["gan/r1"] = penalty.detach()
            loss = loss + routed(0.5 * self.r1 * penalty, list(self.head.parameters()))
        return loss, telemetry

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """D at noised samples, (B,): the estimate of log p_real(x_t)/p_student(x_t) when the head is at its optimum."""
        return self.head(self._features(x_t, t, condition))  # type: ignore[no-any-return]

    def _r1(self, rollout: Rollout, y_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.r1_form == "exact":
            y_t = y_t.requires_grad_()
            (gradient,) = torch.autograd.grad(self.logits(y_t, t, condition).sum(), y_t, create_graph=True)
            return gradient.float().pow(2).flatten(1).sum(1).mean()
        u = normal(y_t.shape, rollout.random("gan-r1"), y_t.device)
        moved = self.logits(y_t + self.r1_delta * u, t, condition)
        return ((moved - self.logits(y_t, t, condition)).float() / self.r1_delta).pow(2).mean()

    def _inputs(self, rollout: Rollout) -> list[tuple[Tensor, Tensor, Condition]]:
        """(x_t, t, condition) of the student's samples and of real ones."""
        real, condition = rollout.real()
        both = ((rollout.samples, rollout.condition, "gan-fake"), (real, condition, "gan-real"))
        drawn = [(x, c, *self._draw(rollout, purpose, x)) for x, c, purpose in both]
        return [(self._noised(x, t, noise), t, c) for x, c, t, noise in drawn]

    def _draw(self, rollout: Rollout, purpose: str, x: Tensor) -> tuple[Tensor, Tensor]:
        rng = rollout.random(purpose)
        u = uniform(len(x), rng, x.device)
        return time_at(self.roles.family.schedule, u), normal(x.shape, rng, x.device)

    def _noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return add_noise(x, noise, *coefficients(self.roles.family.schedule, t))

    def _features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        features: dict[str, Tensor] = self.roles.family.predict(
            self.network, x_t, t, condition, taps=(self.tap,)
        ).features
        return features[self.tap]


class _Pass(nn.Module):
    """A pass through a network as a module of its own, so that ``functional_call`` can lend the network tensors."""

    def __init__(self, network: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self) -> Any:
        return self.run()


def classification(student: Tensor, real: Tensor) -> Tensor:
    """softplus(D(student)) + softplus(−D(real)), means over the batch; the optimum is D = log p_real/p_student."""
    return softplus(student.float()).mean() + softplus(-real.float()).mean()
