"""f-distill (arXiv 2502.15681): the divergence of distribution matching as a weight on its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.objectives.gan import Adversary
from distill.objectives.plan import Hook, Matching, Roles, Rollout, Terms, buffers
from distill.parallel.device import moved

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "jensen-shannon": lambda r: r / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "squared-hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""h(r) = f''(r)·r² up to a constant factor, r = p_real/p_student at x_t."""


class DivergenceWeight(Hook):
    """The whole displacement times h(r_i), with the ratio r = e^{D(x_t)} of the discriminator; reverse KL is DMD.

    Jensen–Shannon, r clipped to [0.1, 20] and divided by its mean per time bin are the reference code's (high
    confidence). It also divides h by its mean over the batch, which would couple samples; here both means are those of
    earlier iterations (``decay``), so that micro-batches give what the batch gives.
    """

    terms = Terms(beta="h(p/q)", alpha="h(p/q)")

    memory: nn.Module

    def __init__(
        self,
        roles: Roles,
        adversary: Adversary,
        *,
        divergence: str = "jensen-shannon",
        bounds: tuple[float, float] = (0.1, 20.0),
        bins: int = 10,
        decay: float = 0.9,
    ) -> None:
        self.roles, self.adversary, self.h, self.bounds, self.decay = (
            roles,
            adversary,
            WEIGHTS[divergence],
            bounds,
            decay,
        )
        self.memory = buffers(ratio=torch.ones(bins), level=torch.ones(1))

    def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self.adversary.logits(matching.x_t, matching.t, rollout.condition).float()
            ratio = logits.clamp(-10, 10).exp().clamp(*self.bounds)
            means, level = (moved(self.memory.get_buffer(name), ratio.device) for name in ("ratio", "level"))
            bins = (matching.t / self.roles.family.schedule.t_max * len(means)).long().clamp_max(len(means) - 1)
            raw = self.h(ratio / means[bins])
            weight = raw / level
        rollout.cache["f-distill"] = (bins, ratio, raw)
        rollout.telemetry |= {"f_ratio": ratio.mean(), "f_weight": weight.mean(), "f_weight_max": weight.max()}
        return weight, weight

    @torch.no_grad()
    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        seen = [r.cache["f-distill"] for r in rollouts if "f-distill" in r.cache]
        if not seen:
            return
        bins, ratio, raw = (torch.cat(column).cpu() for column in zip(*seen, strict=True))
        means, level = self.memory.get_buffer("ratio"), self.memory.get_buffer("level")
        count = torch.bincount(bins, minlength=len(means))
        fresh = torch.bincount(bins, weights=ratio.double(), minlength=len(means)) / count.clamp_min(1)
        means.copy_(torch.where(count > 0, torch.lerp(fresh.to(means), means, self.decay), means))
        level.lerp_(raw.mean().reshape(1), 1 - self.decay)
