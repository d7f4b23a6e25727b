"""The update plan of distribution-matching distillation and the slots in which methods put their terms.

Without hooks the plan is DMD2 (arXiv 2405.14867) without its GAN. A hook may choose at which noise levels the samples
are re-noised, replace the teacher, weigh the two displacements of the student's update, weigh the fake score's loss,
add losses and bring a discriminator; hooks combine by multiplication of weights and addition of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.families.base import Condition
from distill.parallel.device import moved
from distill.sampling import Schedule
from distill.telemetry.sink import Value

Telemetry = dict[str, Value]
Part = Literal["dm", "ca", "fake"]
"""What is re-noised: for distribution matching, for conditional alignment, or for the fake score's own loss."""


def _missing(name: str) -> Callable[..., Any]:
    def refuse(*asked: Any) -> Any:
        raise ValueError(f"this rollout has no {name}; its task gives none, or the recipe names no advantage.reward")

    return refuse


@dataclass
class Rollout:
    """What one micro-batch of an iteration shares between its phases.

    x: (B, C, h, w) the student's clean samples; with a graph in the student's phase only.
    condition, prompts: what the samples were asked to show. steps, index: the student's sampler and the step in it.
    advantage: () -> (B,) raw group advantages, computed on first use. rewards: () -> (B,), NaN where not finite.
    start, t: the input x_{t_k} of that step and its time in the model's units. level, until: where that step and the
    next lie as fractions of the time axis (0 after the last step). eps: the student's noise estimate at x_{t_k},
    without a graph. trust: factor in [0, 1] that safeguards put on the squashed advantage.
    heldout: scores (B,) of rewards that nothing trains on. random: a generator of this micro-batch by purpose.
    real: () -> clean latents of the data like x, and their conditions. renoise: (the rollout, a generator) -> times
    (B,) and noise like x, as matching draws them. cache: what hooks keep between phases.
    telemetry: what hooks want to be logged with this micro-batch.
    """

    x: Tensor
    condition: Condition
    prompts: Sequence[Any]
    steps: int
    index: int
    advantage: Callable[[], Tensor] = field(default_factory=lambda: _missing("advantage"))
    rewards: Callable[[], Tensor] = field(default_factory=lambda: _missing("reward"))
    start: Tensor | None = None
    t: float = 0.0
    level: float = 1.0
    until: float = 0.0
    eps: Tensor | None = None
    iteration: int = 0
    trust: float = 1.0
    heldout: dict[str, Tensor] = field(default_factory=dict)
    random: Callable[[str], torch.Generator] = field(default=lambda purpose: torch.Generator().manual_seed(0))
    real: Callable[[], tuple[Tensor, Condition]] = field(default_factory=lambda: _missing("real samples"))
    renoise: Callable[[Rollout, torch.Generator], tuple[Tensor, Tensor]] = field(
        default_factory=lambda: _missing("way to re-noise")
    )
    cache: dict[str, Any] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=dict)

    @property
    def samples(self) -> Tensor:
        """x without a graph."""
        return self.x.detach()


@dataclass
class Matching:
    """What the student's phase has computed when hooks weigh it; nothing here has a graph.

    t: (B,) times of re-noising for distribution matching, x_t: the samples there, x_c and x_f: the clean estimates of
    the teacher and the fake score at x_t, dm and ca: the displacements x_c − x_f and x_c − x_u, guidance: ω.
    alpha, beta: (B,) weights once they are known; scale: (B,) the normaliser n; teacher: the network of x_c.
    """

    t: Tensor
    x_t: Tensor
    x_c: Tensor
    x_f: Tensor
    dm: Tensor
    ca: Tensor
    guidance: float
    scale: Tensor
    alpha: Tensor
    beta: Tensor
    teacher: nn.Module


@dataclass(frozen=True)
class Roles:
    """What a hook may need of a run: the family, its networks and the source of samples."""

    family: Any
    teacher: nn.Module
    student: nn.Module
    fake: nn.Module
    samples: Any = None


@dataclass(frozen=True)
class Terms:
    """What a hook puts into each slot of the operator, in words; empty where it leaves the slot alone."""

    beta: str = ""
    alpha: str = ""
    weight: str = ""
    real: str = ""
    times: str = ""
    ca_times: str = ""
    extra: str = ""


class Hook:
    """One method's terms; the defaults add nothing."""

    terms: ClassVar[Terms] = Terms()
    """What the generated table of methods says of this hook."""

    @classmethod
    def terms_in(cls, sections: Mapping[str, Any]) -> Terms:
        """The same for a recipe with these sections, where they decide."""
        return cls.terms

    memory: nn.Module | None = None
    """What must survive a resumed run: buffers, which stay on the host, or parameters, which the fake score trains."""

    def attend(self, rollout: Rollout) -> None:
        """Called before a phase's networks see the samples of a rollout."""

    def times(self, rollout: Rollout, part: Part, rng: torch.Generator, low: float, high: float) -> Tensor | None:
        """Where ``part`` is re-noised: fractions (B,) float64 of the time axis in [low, high], 1 = pure noise.

        They lie on the host. None leaves it as it is: uniform, and for "ca" the same times and noise as "dm".
        """
        return None

    def noise(self, rollout: Rollout, part: Part, t: Tensor, noise: Tensor) -> Tensor:
        """The noise to use for ``part`` at times t (B,) in the place of fresh ``noise``."""
        return noise

    def teacher(self, rollout: Rollout, teacher: nn.Module) -> nn.Module:
        """The network whose estimates are called real."""
        return teacher

    def judge(self, rollout: Rollout, advantage: Tensor) -> Tensor:
        """A second opinion on the raw advantages (B,), before they are squashed."""
        return advantage

    def trust(self, iteration: int) -> float:
        """Factor in [0, 1] on the squashed advantages of this iteration."""
        return 1.0

    def student_weights(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        """(α, β) of the conditional-alignment and the distribution-matching displacement, each (B,)."""
        ones = torch.ones(len(rollout.x), device=rollout.x.device)
        return ones, ones

    def limit(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        """(α, β) after a bound on the product of all hooks' weights, which matching.alpha and matching.beta hold."""
        return matching.alpha, matching.beta

    def displacement(self, rollout: Rollout, matching: Matching) -> Tensor | None:
        """A further displacement like x, added to H before it is divided by the normaliser."""
        return None

    def fake_weight(self, rollout: Rollout, t: Tensor) -> Tensor:
        """Weight per sample of the fake score's loss at times t, (B,)."""
        return torch.ones(len(rollout.x), device=rollout.x.device)

    def extra_student_loss(self, rollout: Rollout) -> Tensor | None:
        """A further loss on the student's samples, with a graph."""
        return None

    def extra_fake_loss(self, rollout: Rollout) -> Tensor | None:
        """A further loss of the fake score."""
        return None

    def student_telemetry(self, rollout: Rollout, matching: Matching) -> Telemetry:
        """What to log of the student's phase."""
        return {}

    def fake_telemetry(self, rollout: Rollout, t: Tensor, errors: Tensor, weight: Tensor) -> Telemetry:
        """What to log of the fake score's phase: its errors (B,) at times t (B,) and their weights (B,)."""
        return {}

    def after_student_step(self) -> None:
        """Called once after each step of the student's optimizer."""

    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        """Called once at the end of each iteration with the rollouts of its micro-batches."""


def student_weights(hooks: Sequence[Hook], rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
    """Product of the hooks' (α, β), then their limits; both are left in ``matching``."""
    for hook in hooks:
        a, b = hook.student_weights(rollout, matching)
        matching.alpha, matching.beta = matching.alpha * a, matching.beta * b
    for hook in hooks:
        matching.alpha, matching.beta = hook.limit(rollout, matching)
    return matching.alpha, matching.beta


def fake_weight(hooks: Sequence[Hook], rollout: Rollout, t: Tensor) -> Tensor:
    """Product of the hooks' weights of the fake loss."""
    weight = torch.ones(len(rollout.x), device=rollout.x.device)
    for hook in hooks:
        weight = weight * hook.fake_weight(rollout, t)
    return weight


def buffers(**tensors: Tensor) -> nn.Module:
    """A module that holds these tensors and nothing else: a hook's memory."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.clone())
    return module


def routed(loss: Tensor, inputs: Sequence[Tensor], onto: Sequence[Tensor] | None = None) -> Tensor:
    """A scalar of the loss's value whose gradient reaches ``onto`` (the inputs themselves if None) and nothing else.

    Frees the loss's graph at once. Gradients that are not finite become zero.
    """
    gradients = torch.autograd.grad(loss, list(inputs), allow_unused=True)
    total = loss.detach()
    for target, gradient in zip(inputs if onto is None else onto, gradients, strict=True):
        if gradient is not None:
            total = total + ((target - target.detach()) * gradient.nan_to_num(0.0, 0.0, 0.0)).sum()
    return total


def trust(hooks: Sequence[Hook], iteration: int) -> float:
    """Product of the hooks' factors on the squashed advantage."""
    product = 1.0
    for hook in hooks:
        product *= hook.trust(iteration)
    return product


def claimed_times(
    hooks: Sequence[Hook],
    schedule: Schedule,
    rollout: Rollout,
    part: Part,
    rng: torch.Generator,
    bounds: Sequence[float],
) -> Tensor | None:
    """Times (B,) in the model's units, where the samples are, from the hook that claims a part; or None."""
    low, high = bounds
    for hook in hooks:
        fraction = hook.times(rollout, part, rng, low, high)
        if fraction is not None:
            return moved(time_at(schedule, fraction), rollout.x.device)
    return None


def time_at(schedule: Schedule, fraction: Tensor) -> Tensor:
    """Times (B,) float64 at fractions of the axis: whole timesteps for discrete schedules (t = 749 ends at 0.75)."""
    if schedule.t_max > 1:
        return (fraction * (schedule.t_max + 1)).floor().clamp(0, schedule.t_max)
    return fraction


def fraction_of(schedule: Schedule, t: float) -> float:
    """The fraction of the axis up to and including time t."""
    return (t + 1) / (schedule.t_max + 1) if schedule.t_max > 1 else t
