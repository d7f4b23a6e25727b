"""SenseFlow's two stabilisers (arXiv 2506.00523); its discriminator is in distill.objectives.foundation."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.math import expand
from distill.objectives.ode import CLEAN, follow, noise_level
from distill.objectives.plan import Hook, Roles, Rollout, Terms, time_at


class ImplicitAlignment(Hook):
    """IDA: after each step of the student φ ← λ·φ + (1 − λ)·θ, which keeps the fake score near the student's samples.

    λ = 0.97 to 0.98 in the reference code (high confidence). Student and fake must have the same architecture.
    """

    terms = Terms(extra="φ ← λ·φ + (1 − λ)·θ after each step")

    def __init__(self, roles: Roles, decay: float) -> None:
        self.roles, self.decay = roles, decay

    @torch.no_grad()
    def after_student_step(self) -> None:
        fake, student = (tuple(m.parameters()) for m in (self.roles.fake, self.roles.student))
        torch._foreach_lerp_(fake, student, 1 - self.decay)


class IntraSegmentGuidance(Hook):
    """ISG: λ·huber(x_s − sg[x_s']), where x_s is reached by the student's step from t_k to s = t_{k+1} and x_s' by the
    teacher's step to some m in between, followed by the student's from there.

    λ = 0.5, c = 0.001 of huber(d) = √(d² + c²) − c, and a margin of 50/1000 at both ends of the segment (reference
    code, high confidence). The reference draws the teacher's guidance from U(2, 4); here it is the recipe's.
    """

    terms = Terms(extra="huber between two paths through a segment")

    def __init__(self, roles: Roles, *, weight: float, guidance: float, margin: float = 0.05, c: float = 1e-3) -> None:
        self.roles, self.weight, self.guidance, self.margin, self.c = roles, weight, guidance, margin, c

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        assert rollout.start is not None, "the rollout keeps the input of its step"
        low, high = rollout.until + self.margin, rollout.level - self.margin
        if low >= high:
            return None
        family, start = self.roles.family, rollout.start
        u = torch.rand(1, generator=rollout.random("segment"), dtype=torch.float64, device="cpu")
        middle = float(time_at(family.schedule, low + u * (high - low)))
        following = [float(t) for t in family.schedule.grid(rollout.steps)][rollout.index + 1 :]
        end = following[0] if following else CLEAN
        with torch.no_grad():
            x_m = follow(family, self.roles.teacher, start, rollout.condition, [rollout.t, middle], self.guidance)
            times = torch.full((len(start),), middle, dtype=torch.float64, device=start.device)
            x0_m = family.predict(self.roles.student, x_m, times, rollout.condition).x0
            target = self._step(x_m, x0_m, middle, end)
        difference = self._step(start, rollout.x, rollout.t, end) - target
        loss = ((difference.pow(2) + self.c**2).sqrt() - self.c).mean()
        rollout.telemetry["segment"] = loss.detach()
        return self.weight * loss

    def _step(self, x_t: Tensor, x0: Tensor, t: float, s: float) -> Tensor:
        """One deterministic step: α_s·x0 + σ_s·(x_t − α_t·x0)/σ_t."""
        (a_t, s_t), (a_s, s_s) = (noise_level(self.roles.family, time, x_t) for time in (t, s))
        on_x0, on_x = (expand(c, x_t).to(x_t) for c in (a_s - s_s * a_t / s_t, s_s / s_t))
        return on_x0 * x0 + on_x * x_t
