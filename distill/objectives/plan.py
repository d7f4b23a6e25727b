"""The update plan of distribution-matching distillation and the slots in which methods put their terms.

Without hooks the plan is DMD2 (arXiv 2405.14867) without its GAN. A hook may weight the two displacements of the
student's update, weight the fake score's loss, and add losses; hooks combine by multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.families.base import Condition

Telemetry = dict[str, Tensor | float]


@dataclass
class Rollout:
    """What one micro-batch of an iteration shares between its phases.

    x: (B, C, h, w) the student's clean samples; with a graph in the student's phase only.
    condition, prompts: what the samples were asked to show. steps, index: the student's sampler and the step in it.
    advantage: () -> (B,) raw group advantages, computed on first use.
    """

    x: Tensor
    condition: Condition
    prompts: Sequence[Any]
    steps: int
    index: int
    advantage: Callable[[], Tensor]

    @property
    def samples(self) -> Tensor:
        """x without a graph."""
        return self.x.detach()


class Hook:
    """One method's terms; the defaults add nothing."""

    def student_weights(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(α, β) of the conditional-alignment and the distribution-matching displacement, each (B,)."""
        ones = torch.ones(len(rollout.x))
        return ones, ones

    def fake_weight(self, rollout: Rollout) -> Tensor:
        """Weight per sample of the fake score's loss, (B,)."""
        return torch.ones(len(rollout.x))

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        """A further loss on the student's samples, with a graph."""
        return None

    def extra_fake_loss(self, rollout: Rollout) -> Tensor | None:
        """A further loss of the fake score."""
        return None

    def after_student_step(self) -> None:
        """Called once after each step of the student's optimizer."""


def student_weights(hooks: Sequence[Hook], rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Product of the hooks' (α, β)."""
    alpha, beta = torch.ones(len(rollout.x)), torch.ones(len(rollout.x))
    for hook in hooks:
        a, b = hook.student_weights(rollout)
        alpha, beta = alpha * a, beta * b
    return alpha, beta


def fake_weight(hooks: Sequence[Hook], rollout: Rollout) -> Tensor:
    """Product of the hooks' weights of the fake loss."""
    weight = torch.ones(len(rollout.x))
    for hook in hooks:
        weight = weight * hook.fake_weight(rollout)
    return weight
