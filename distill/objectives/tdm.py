"""TDM (arXiv 2503.06674): each step of the student matches the teacher's marginals within its own segment of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.families.base import coefficients
from distill.math import expand, min_snr_weight
from distill.objectives.plan import Hook, Part, Roles, Rollout, Terms


class SubIntervalMatching(Hook):
    """Step k is re-noised within [t_{k+1}, t_k] for matching and for the fake score, whose loss is min(SNR, 5)·‖Δx0‖².

    deterministic: x travels with the student's own noise estimate ε_θ to t_{k+1} and is diffused from there:
    ε' = (ρ·σ_s·ε_θ + √(σ_t² − ρ²σ_s²)·ε)/σ_t with s = t_{k+1}, ρ = α_t/α_s. That noise is not independent of x, and the
    fake loss gets the weight exp(−½·mean ε'²)/exp(−½·mean ε²). Samplers with fresh noise need neither.
    Segments, cap and weight are the reference code's (high confidence); a cap of None leaves the family's own loss. Its
    student loss lacks our ½. The paper's losses are updated 1:1, fake_per_student: 1.
    """

    terms = Terms(times="uniform in [t_{k+1}, t_k]", weight="min(SNR, 5)")

    @classmethod
    def terms_in(cls, sections: Mapping[str, Any]) -> Terms:
        if sections.get("sampler") != "deterministic":
            return cls.terms
        return replace(cls.terms, weight=f"{cls.terms.weight}·exp(½(ε² − ε'²))")

    def __init__(self, roles: Roles, *, deterministic: bool, snr_cap: float | None = 5.0) -> None:
        self.roles, self.deterministic, self.snr_cap = roles, deterministic, snr_cap

    def times(self, rollout: Rollout, part: Part, rng: torch.Generator, low: float, high: float) -> Tensor | None:
        if part == "ca":
            return None
        low, high = max(low, rollout.until), min(high, rollout.level)
        u = torch.rand(len(rollout.x), generator=rng, dtype=torch.float64)
        return low + u * (max(high, low) - low)

    def noise(self, rollout: Rollout, part: Part, t: Tensor, noise: Tensor) -> Tensor:
        if not self.deterministic or rollout.index + 1 == rollout.steps:
            return noise
        assert rollout.eps is not None, "the rollout keeps the student's noise estimate"
        schedule = self.roles.family.schedule
        s = torch.full_like(t, float(schedule.grid(rollout.steps)[rollout.index + 1])).minimum(t)
        (a_t, s_t), (a_s, s_s) = coefficients(schedule, t), coefficients(schedule, s)
        own = a_t / a_s * s_s
        fresh = (s_t**2 - own**2).clamp_min(0).sqrt()
        mixed = expand(own / s_t, noise).to(noise) * rollout.eps + expand(fresh / s_t, noise).to(noise) * noise
        if part == "fake":
            energy = (mixed.pow(2) - noise.pow(2)).flatten(1).mean(1)
            rollout.cache["tdm"] = torch.exp(-0.5 * energy)
        return mixed

    def fake_weight(self, rollout: Rollout, t: Tensor) -> Tensor:
        family = self.roles.family
        weight = torch.ones(len(t), device=t.device)
        if self.snr_cap is not None:
            weight = min_snr_weight(family.prediction, *coefficients(family.schedule, t), self.snr_cap).float()
        importance = rollout.cache.get("tdm")
        return weight if importance is None else weight * importance
