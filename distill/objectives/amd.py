"""Adaptive Matching Distillation (arXiv 2602.07345): both of its mechanisms as hooks, each usable alone.

Both read the group advantage a_i = (r_i − μ_g)/(σ_g + ε) of a reward that is never differentiated (Eq. 12).
"""

from __future__ import annotations

from torch import Tensor

from distill.math import adaptive_weights, sharpening_weight
from distill.objectives.plan import Hook, Rollout


class DynamicScoreAdaptation(Hook):
    """α_i, β_i = 1 ± s·ã_i (Eq. 13, linear form inferred): poor samples are pushed by distribution matching."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def student_weights(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return adaptive_weights(rollout.advantage(), self.strength)


class RepulsiveSharpening(Hook):
    """W(a) = exp(−a) on the fake loss: the fake score learns poor samples more sharply, so they repel more.

    clipped: a is clipped to [−1, 1], which bounds the tilt of the density that the fake score learns.
    group: if given, W is scaled to mean 1 within groups, which keeps the fake score's effective learning rate.
    """

    def __init__(self, *, clipped: bool = True, group: int | None = None) -> None:
        self.clipped, self.group = clipped, group

    def fake_weight(self, rollout: Rollout) -> Tensor:
        advantage = rollout.advantage()
        return sharpening_weight(advantage.clamp(-1, 1) if self.clipped else advantage, group=self.group)
