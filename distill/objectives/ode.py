"""The teacher's deterministic sampler, for hooks that compare the student with what the teacher would have done."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distill.families.base import Condition, coefficients
from distill.math import expand, guide
from distill.objectives.dmd import both

CLEAN = -1.0
"""Stands for the time after the last step of a grid, where (α, σ) = (1, 0)."""


@torch.no_grad()
def follow(
    family: Any, teacher: nn.Module, x: Tensor, condition: Condition, times: Sequence[float], guidance: float
) -> Tensor:
    """From x at times[0] to times[-1] by DDIM steps (Euler's for flows): x' = α'·x̂ + σ'·ε̂, both guided linearly.

    x: (B, …); times fall, in the model's units, and may end with CLEAN.
    """
    for t, t_next in pairwise(times):
        conditional, empty = both(family, teacher, x, _times(t, x), condition)
        x0, eps = guide(empty.x0, conditional.x0, guidance), guide(empty.eps, conditional.eps, guidance)
        alpha, sigma = (expand(c, x).to(x) for c in noise_level(family, t_next, x))
        x = alpha * x0 + sigma * eps
    return x


def noise_level(family: Any, t: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) at one time for the rows of a tensor, each (B,) float64; (1, 0) at CLEAN."""
    if t == CLEAN:
        return _times(1.0, like), _times(0.0, like)
    return coefficients(family.schedule, _times(t, like))


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, dtype=torch.float64, device=like.device)
