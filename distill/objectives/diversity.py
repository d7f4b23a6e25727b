"""DP-DMD (arXiv 2602.03139): the first step learns where the teacher's trajectories go, and thereby their diversity."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.math import ode_target
from distill.objectives.ode import CLEAN, follow, noise_level
from distill.objectives.plan import Hook, Matching, Roles, Rollout, Terms


class FirstStepAnchor(Hook):
    """λ·‖x_θ − x̂‖² on the first step, where x̂ leads in one step to where k of the teacher's n ODE steps lead.

    λ = 0.05, k = 5, n = 30, the teacher guided (reference code, high confidence). The reference compares velocities;
    from pure noise that is the same in x0-space, ‖v_θ − (x_1 − z_k)/(1 − t_k)‖², and x0-space needs no flow.
    matching: also apply distribution matching to the first step; the paper does not, it detaches after that step. The
    only step of a student of one is matched in any case.
    Here each iteration trains one step of the grid, so that both terms are met as often as their steps are drawn.
    """

    terms = Terms(beta="0 if k = 1 < K", alpha="0 if k = 1 < K", extra="λ·‖x − x̂‖² to the teacher's ODE if k = 1")

    def __init__(
        self, roles: Roles, *, weight: float, anchor: int, steps: int, guidance: float, matching: bool = False
    ) -> None:
        self.roles, self.weight, self.guidance, self.matching = roles, weight, guidance, matching
        self.path = [*(float(t) for t in roles.family.schedule.grid(steps)), CLEAN][: anchor + 1]

    def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        keep = self.matching or rollout.index > 0 or rollout.steps == 1
        weight = torch.full((len(rollout.x),), float(keep), device=rollout.x.device)
        return weight, weight

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        if rollout.index > 0:
            return None
        assert rollout.start is not None, "the rollout keeps the input of its step"
        loss = (rollout.x.float() - self.target(rollout.start, rollout)).pow(2).mean()
        rollout.telemetry["anchor"] = loss.detach()
        return self.weight * loss

    def target(self, start: Tensor, rollout: Rollout) -> Tensor:
        """x̂ like start (B, …), where the student's own first step should aim."""
        family = self.roles.family
        end = follow(family, self.roles.teacher, start, rollout.condition, self.path, self.guidance)
        at_start, at_end = (noise_level(family, t, start) for t in (self.path[0], self.path[-1]))
        return ode_target(start, end, at_start, at_end)
