"""A real teacher that leans towards the fake score, so that it is competent where the student is.

MagicDistillation (arXiv 2503.13319) gives it a constant share, DMDR's dynamic distribution guidance (arXiv 2511.13649)
an annealed one. Both add a share of the fake score's LoRA to the teacher; θ_real = θ + w·(φ − θ) is the same for a
LoRA φ = θ + BA, and is defined for a fake score whose every weight is trained.
"""

from __future__ import annotations

import copy
from math import cos, pi

import torch
from torch import nn

from distill.objectives.plan import Hook, Roles, Rollout, Terms
from distill.parallel.shard import local


class SharedTeacher(Hook):
    """θ_real = θ + w·(φ − θ) with w = share·½(1 + cos(π·i/anneal)), zero from iteration ``anneal`` on; None: constant.

    MagicDistillation: constant; 0.25 is our reading of a family of implementations (low confidence).
    DMDR: 0.75 of a LoRA whose own scale is 2.0, that is 0.375 of the fake score's difference, annealed over 10,000
    iterations (reference script, high confidence). Keeps one more network in memory.
    """

    terms = Terms(real="θ + w·(φ − θ)")

    def __init__(self, roles: Roles, *, share: float, anneal: int | None = None) -> None:
        self.roles, self.share, self.anneal = roles, share, anneal
        self.network = copy.deepcopy(roles.teacher)
        self._blended = -1

    def weight(self, iteration: int) -> float:
        if self.anneal is None:
            return self.share
        return self.share * 0.5 * (1 + cos(pi * min(1.0, iteration / self.anneal)))

    @torch.no_grad()
    def teacher(self, rollout: Rollout, teacher: nn.Module) -> nn.Module:
        weight = self.weight(rollout.iteration)
        if weight == 0.0:
            return teacher
        if self._blended != rollout.iteration:
            mine, real, fake = ([local(p) for p in m.parameters()] for m in (self.network, teacher, self.roles.fake))
            torch._foreach_copy_(mine, real)
            torch._foreach_lerp_(mine, fake, weight)
            self._blended = rollout.iteration
        return self.network
