"""The probe of a distillation: which prompts and noise, at which level, and how they are sampled and scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import DistillRecipe
from distill.objectives.plan import Roles, Rollout, fraction_of
from distill.rewards.latent import scores_of
from distill.sampling import Table, ode_table
from distill.tasks.common import to_uint8
from distill.tasks.diffusion import sample
from distill.telemetry.probe import Probe, Sources, slices

PROMPTS = 1 << 20
"""The micro-batch whose prompts are the probe's: training never draws it."""


def new_probe(recipe: DistillRecipe, roles: Roles, table: Table, judges: Mapping[str, Any]) -> Probe:
    """A probe of the student sampled by ``table``; judges are rewards by the name under which scores are told."""
    family, options, rows = roles.family, recipe.telemetry, recipe.batch_size // recipe.accumulate
    prompts = roles.samples.conditions(0, PROMPTS, options.prompts)
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    condition, pieces = family.encode(prompts), slices(len(prompts), rows)

    def draw(network: nn.Module, sampler: Table, guidance: float) -> Tensor:
        drawn = []
        for piece in pieces:
            some = {name: value[piece] for name, value in condition.items()}
            drawn.append(sample(family, network, sampler, some, list(range(len(prompts)))[piece], guidance))
        return torch.cat(drawn).float()

    def scores(x: Tensor) -> dict[str, Tensor]:
        if not judges:
            return {}

        def pictures(latents: Tensor) -> Tensor:
            return torch.cat([to_uint8(family.decode(latents[piece])) for piece in pieces])

        return dict(zip(judges, scores_of(list(judges.values()), x, prompts, pictures), strict=True))

    teacher = ode_table(family.schedule, family.prediction, options.teacher_steps)
    sources = Sources(
        condition,
        student=lambda: draw(roles.student, table, 1.0),
        teacher=lambda: draw(roles.teacher, teacher, recipe.guidance),
        scores=scores,
        rows=rows,
    )
    floor = recipe.advantage.sigma_floor if recipe.advantage else 0.0
    placed = options.model_copy(update={"level": level(recipe, roles)})
    return Probe(roles, sources, placed, seed=recipe.seed, sigma_floor=floor)


def level(recipe: DistillRecipe, roles: Roles) -> float:
    """telemetry.level as a fraction of the time axis, or of the last step's own part where the fake knows no other."""
    if not recipe.sub_interval:
        return recipe.telemetry.level
    schedule, steps = roles.family.schedule, max(recipe.steps)
    return recipe.telemetry.level * fraction_of(schedule, float(schedule.grid(steps)[-1]))


def finished(recipe: DistillRecipe) -> Rollout:
    """What hooks are told of the samples that a probe measures: they come from the last step of the longest grid."""
    steps = max(recipe.steps)
    return Rollout(torch.empty(0), {}, (), steps, steps - 1)
