"""Adaptive Matching Distillation (arXiv 2602.07345): both of its mechanisms as hooks, each usable alone.

Both read the group advantage a_i = (r_i − μ_g)/(σ_g + ε) of a reward that is never differentiated (Eq. 12). What is
known of the paper's choices, and how well:

    weights α + β = 2 in [1 − s, 1 + s]                  quoted (Eq. 13), high
    ã = clip(a, −1, 1)                                   ±1 inferred from that range, medium; tanh is ours
    baseline μ_g and deviation σ_g of the group          quoted (Eq. 12), high; leave-one-out is ours
    s = 0.1 for pictures, 0.05 for video                 third hand, low; sweep 0.05 to 0.5
    W(a) = exp(−a)                                       quoted, high
    a raw or squashed in W, W scaled to mean 1 or not    unknown; squashed and scaled are our defaults
    group size, ε, a floor of σ_g                        unknown
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.math import adaptive_weights, sharpening_weight, squash
from distill.objectives.plan import Hook, Matching, Rollout, Terms

Squash = Callable[[Tensor], Tensor]


class DynamicScoreAdaptation(Hook):
    """α_i, β_i = 1 ± s·ã_i (Eq. 13, linear form inferred): poor samples are pushed by distribution matching."""

    terms = Terms(beta="1 − s·ã", alpha="1 + s·ã")

    def __init__(self, strength: float, *, squash: Squash = squash) -> None:
        self.strength, self.squash = strength, squash

    def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        return adaptive_weights(self.squash(rollout.advantage()), self.strength * rollout.trust)


class RepulsiveSharpening(Hook):
    """W(a) = exp(−a) on the fake loss: the fake score learns poor samples more sharply, so they repel more.

    clipped: a is squashed as for the student, which bounds the tilt of the density that the fake score learns.
    group: if given, W is scaled to mean 1 within groups, which keeps the fake score's effective learning rate.
    """

    terms = Terms(weight="exp(−ã)")

    def __init__(self, *, clipped: bool = True, group: int | None = None, squash: Squash = squash) -> None:
        self.clipped, self.group, self.squash = clipped, group, squash

    def fake_weight(self, rollout: Rollout, t: Tensor) -> Tensor:
        advantage = rollout.advantage()
        return sharpening_weight(
            rollout.trust * (self.squash(advantage) if self.clipped else advantage), group=self.group
        )


class RewardWeight(Hook):
    """Re-DMD (Reward Forcing): the student's whole displacement is multiplied by exp(κ·r), the fake loss is not.

    κ = 2 and r, the standardised motion quality of VideoAlign, are the reference code's (high confidence); it scores
    the first sample of a batch only and bounds nothing, we score each. r = (reward − centre)/scale with fixed numbers,
    as VideoAlign's are; ``bound`` clips r. Where AMD lowers β for good samples, this raises both weights.
    A reward that is not finite counts as r = 0.
    """

    terms = Terms(beta="exp(κ·r)", alpha="exp(κ·r)")

    def __init__(self, kappa: float, *, centre: float = 0.0, scale: float = 1.0, bound: float | None = None) -> None:
        self.kappa, self.centre, self.scale, self.bound = kappa, centre, scale, bound

    def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        r = ((rollout.rewards() - self.centre) / self.scale).nan_to_num(0.0)
        weight = torch.exp(self.kappa * (r if self.bound is None else r.clamp(-self.bound, self.bound)))
        return weight, weight
