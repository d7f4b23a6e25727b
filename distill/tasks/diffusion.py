"""Teacher training: the denoising loss of the family's own parametrisation, with dropped conditions for guidance.

python -m distill.run recipes/scenes-teacher.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.bundle import Guidance, Manifest, Sampler, write_manifest
from distill.compiled import compile_blocks
from distill.config import DiffusionRecipe, SceneData, SdxlSource, WanSource
from distill.data.cache import FPS
from distill.families.base import Condition, coefficients
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.families.wan import Wan
from distill.math import add_noise, target_for
from distill.objectives.dmd import native
from distill.parallel.device import device, moved, normal
from distill.provenance import provenance
from distill.sampling import Flow, Schedule, noise, ode_table
from distill.tasks.common import autocast, to_uint8
from distill.tasks.samples import samples_for
from distill.tasks.video import stills
from distill.telemetry.sink import Some
from distill.trainer import Phase, Telemetry, generator

TEACHER_STEPS = (1, 2, 4, 8)


def draw_times(schedule: Schedule, n: int, rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """n times in [low, high]·t_max, (B,) float64: whole and uniform for discrete schedules, shifted as flows are.

    They lie on the host.
    A flow trained with a time shift spends its capacity there, so its teacher, fake score and sampler share it
    (Self-Forcing warps uniform times and clamps them to the bounds; here they are drawn between the bounds).
    """
    u = torch.rand(n, generator=rng, dtype=torch.float64)
    if schedule.t_max > 1:
        first, last = round(low * (schedule.t_max + 1)), min(round(high * (schedule.t_max + 1)), int(schedule.t_max))
        return (first + (u * (last - first + 1)).floor()).clamp_max(last)
    if isinstance(schedule, Flow) and schedule.shift != 1.0:
        begin, end = (float(schedule.unwarp(np.asarray(bound))) for bound in (low, high))
        return torch.from_numpy(schedule.warp((begin + u * (end - begin)).numpy()))
    return low + u * (high - low)


@torch.no_grad()
def sample(
    family: Any, network: nn.Module, table: Any, condition: Condition, seeds: list[int], guidance: float = 1.0
) -> Tensor:
    """Run a sampler table in torch: clean latents (B, C, h, w). Row i uses noise(seeds[i], 0)."""
    shape = family.latent_shape()
    drawn = torch.stack([torch.from_numpy(noise(seed, 0, shape, len(table))) for seed in seeds])
    draws, rows = moved(drawn, device()), table.rows.tolist()
    x = draws[:, 0]
    empty = family.unconditional(len(x))
    for i, t in enumerate(table.timesteps):
        times = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
        x0 = family.predict(network, x, times, condition).x0
        if guidance != 1.0:
            unguided = family.predict(network, x, times, empty).x0
            x0 = unguided + guidance * (x0 - unguided)
        _, _, u, y, w = rows[i]
        fresh = draws[:, i + 1] if i + 1 < len(table) else torch.zeros_like(x)
        x = u * x0 + y * x + w * fresh
    return x


def family_of(recipe: DiffusionRecipe) -> Any:
    """The family that a recipe's parts make."""
    model, data = recipe.model, recipe.data
    if isinstance(model, SdxlSource):
        return Sdxl.from_source(model)
    if isinstance(model, WanSource):
        assert isinstance(data, SceneData) and data.frames is not None
        return Wan.from_source(model, size=data.size, frames=data.frames, fps=FPS)
    return Sit(model)


class DiffusionTask:
    """E‖m_θ(x_t, t, c) − target‖² at uniform t, where c is dropped with a probability."""

    def __init__(self, recipe: DiffusionRecipe) -> None:
        self.recipe = recipe
        self.family: Any = family_of(recipe)
        torch.manual_seed(recipe.seed)
        self.network = self.family.to(device()).new_network().train().to(device())
        if recipe.compile:
            compile_blocks([self.network], self.family.wrap_plan())
        self.roles: dict[str, nn.Module] = {"teacher": self.network}
        self.optimizers = {"teacher": recipe.optimizer}
        self.samples = samples_for(recipe.data, recipe.seed, self.family, recipe.precision)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("teacher", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r, family = self.recipe, self.family
        rng = generator(r.seed, iteration, micro, "noise")
        x0, prompts = self.samples.batch(iteration, micro, r.batch_size // r.accumulate)
        x0 = moved(x0, device())
        with autocast(r.precision):
            condition, empty = family.encode(prompts), family.unconditional(len(x0))
        dropped = moved(torch.rand(len(x0), generator=rng) < r.drop_condition, x0.device)
        condition = {k: torch.where(_like(dropped, v), empty[k], v) for k, v in condition.items()}
        t = moved(draw_times(family.schedule, len(x0), rng), x0.device)
        alpha, sigma = coefficients(family.schedule, t)
        eps = normal(x0.shape, rng, x0.device)
        x_t = add_noise(x0, eps, alpha, sigma)
        with autocast(r.precision):
            prediction = family.predict(self.network, x_t, t, condition)
        target = target_for(family.prediction, x0, eps, alpha, sigma)
        errors = (native(family, prediction) - target).pow(2).flatten(1).mean(1)
        late = t > 0.5 * family.schedule.t_max
        apart = errors.detach()
        return errors.mean(), {"noisy_half": Some(apart, late), "clean_half": Some(apart, ~late)}

    def preview(self) -> Tensor:
        r = self.recipe
        conditions = self.samples.preview_conditions()
        table = ode_table(self.family.schedule, self.family.prediction, 20)
        seeds = list(range(len(conditions)))
        with autocast(r.precision):
            latents = sample(self.family, self.network, table, self.family.encode(conditions), seeds, r.guidance)
            return stills(to_uint8(self.family.decode(latents.float())))

    def finish(self, output: Path) -> None:
        """Write the teacher as a bundle, so that it can be exported, served and scored like any student."""
        self.family.to("cpu").save(self.network.cpu(), output)
        steps = sorted({*TEACHER_STEPS, self.recipe.sampling_steps})
        tables = {n: Sampler.of(ode_table(self.family.schedule, self.family.prediction, n)) for n in steps}
        manifest = Manifest(
            name=self.recipe.name,
            samplers=tables,
            default_steps=self.recipe.sampling_steps,
            guidance=Guidance(scale=self.recipe.guidance),
            examples=() if self.recipe.data == "digits" else tuple(self.samples.preview_conditions()),
            provenance=provenance(self.recipe),
            **self.family.describe(),
        )
        write_manifest(output, manifest)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (value.ndim - 1))
