"""Decoupled DMD (arXiv 2511.22677): the alignment's part is re-noised apart from distribution matching."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.plan import Hook, Part, Rollout, Terms


class DecoupledRenoising(Hook):
    """τ_DM uniform, τ_CA uniform between clean and the noise level t_k of the student's own step (Eq. 8).

    Guidance ("the engine") then works on what the step still has to decide, matching ("the regulariser") everywhere.
    The paper writes τ_CA ∼ U(t, 1) with 1 = clean (high confidence). Costs one more call of the teacher per update.
    """

    terms = Terms(ca_times="uniform up to t_k")

    def times(self, rollout: Rollout, part: Part, rng: torch.Generator, low: float, high: float) -> Tensor | None:
        if part != "ca":
            return None
        u = torch.rand(len(rollout.x), generator=rng, dtype=torch.float64)
        return low + u * (max(min(high, rollout.level), low) - low)
