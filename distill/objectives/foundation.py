"""SenseFlow's third part (arXiv 2506.00523): a discriminator that looks at clean pictures through a frozen tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from distill.families.base import coefficients
from distill.objectives.features import Perception
from distill.objectives.gan import Adversary
from distill.objectives.plan import Roles, Rollout, Telemetry, Terms, routed
from distill.parallel.device import device


class Heads(nn.Module):
    """Feature maps (B, C_l, places) of every depth to one logit per picture, (B,): the mean of a logit per place."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.depths = nn.ModuleList(
            nn.Sequential(nn.Conv1d(c, width, 1), nn.LeakyReLU(0.2), nn.Conv1d(width, 1, 1)) for c in channels
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits = [head(features).mean((1, 2)) for head, features in zip(self.depths, maps, strict=True)]
        return torch.stack(logits).mean(0)


class FoundationAdversary(Adversary):
    """Student: −g·(1 − σ_k)²·D(decode(x)). Heads: the hinge loss max(0, 1 + D(x)) + max(0, 1 − D(y)) on real y.

    D reads every layer of a frozen vision tower at clean decoded pictures, not re-noised ones as DMD2's does. Hinge and
    the weight (1 − σ_k)², which keeps it from blurred early steps of the student, are SenseFlow's (second hand, medium
    confidence); so a step from pure noise, and thus a student of one step, learns nothing from it. Its towers are
    DINOv2 and CLIP, which also reads the text; here any tower that a folder holds, without the text, and one hidden
    layer per place as a head. The gradient reaches the student through tower and decoder, in float32.
    """

    terms = Terms(extra="hinge GAN on features of clean pictures, (1 − σ_k)²")

    def __init__(
        self, roles: Roles, look: Perception, *, weight: float, width: int = 64, ramp: int = 0, seed: int = 0
    ) -> None:
        self.roles, self.look, self.weight, self.ramp = roles, look, weight, ramp
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels = roles.family.decode(torch.zeros(1, *roles.family.latent_shape(), device=device()))
            self.head = Heads([maps.shape[1] for maps in look.maps(pixels)], width).to(device())

    def extra_student_loss(self, rollout: Rollout) -> Tensor:
        times = torch.full((len(rollout.x),), rollout.t, dtype=torch.float64, device=rollout.x.device)
        clean = (1 - coefficients(self.roles.family.schedule, times)[1]).square().float()
        leaf = rollout.samples.float().requires_grad_()
        logits = self._logits(leaf)
        rollout.telemetry["gan/student"] = -logits.detach().mean()
        strength = self.weight * min(1.0, (rollout.iteration + 1) / self.ramp) if self.ramp else self.weight
        return routed(-strength * (clean * logits).mean(), [leaf], [rollout.x])

    def extra_fake_loss(self, rollout: Rollout) -> Tensor | None:
        return None

    def discriminator_loss(self, rollout: Rollout) -> tuple[Tensor, Telemetry]:
        real, _ = rollout.real()
        with torch.no_grad():
            maps = [self._maps(x.float()) for x in (rollout.samples, real)]
        student, truth = (self.head(features) for features in maps)
        loss = relu(1 + student).mean() + relu(1 - truth).mean()
        return loss, {
            "gan/logit_student": student.detach().mean(),
            "gan/logit_real": truth.detach().mean(),
            "gan/accuracy": 0.5 * ((student < 0).float().mean() + (truth > 0).float().mean()),
        }

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(self._maps(x))
        return logits

    def _maps(self, x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return self.look.maps(self.roles.family.decode(x).clamp(-1.0, 1.0))
