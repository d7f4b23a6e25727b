"""The diffusers scheduler that takes a bundle's steps: found by its kind, then checked step by step against the rows.

A row (p, q, u, y, w) of distill.sampling says all that a step does, so a scheduler is right if it stands at the same
times and turns the same latents, network output and noise into the same latents. One that does not is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from distill.bundle import Manifest
from distill.sampling import Table

TIMESTEPS = "_timesteps"
"""The key of scheduler_config.json with the times of each number of steps; diffusers ignores names with underscores."""
TOLERANCE = 2e-3
"""Relative error of one step. LCM's skip connection differs from ours by 1e-4 at timestep 49."""


class StepsError(ValueError):
    """No scheduler of diffusers takes these steps; the message names the steps and the way out."""


def scheduler_for(manifest: Manifest, config: dict[str, Any]) -> tuple[Any, dict[int, dict[str, Any]]]:
    """A scheduler and, by number of steps, how to call its ``set_timesteps``. Raises StepsError.

    config: of the bundle's own scheduler: betas, prediction type, shift.
    """
    tables = {n: sampler.table() for n, sampler in manifest.samplers.items()}
    flow = manifest.prediction == "flow"
    fresh = any((table.rows[:, 4] != 0).any() for table in tables.values()) or max(tables) == 1
    scheduler = _flow(config, fresh) if flow else _discrete(config, fresh)
    calls = {n: _call(scheduler, table, flow) for n, table in sorted(tables.items())}
    for n, call in calls.items():
        scheduler.set_timesteps(**call)
        worst = worst_step(scheduler, tables[n])
        if worst > TOLERANCE:
            raise StepsError(
                f"{type(scheduler).__name__} takes other steps than this student's {n} (relative error {worst:.2g}); "
                "publish without diffusers' scheduler, or retrain with sampler: stochastic"
            )
    return scheduler, calls


def _discrete(config: dict[str, Any], fresh: bool) -> Any:
    keys = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "num_train_timesteps",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    shared = {key: config[key] for key in keys if key in config}
    if fresh:
        return LCMScheduler(**shared, original_inference_steps=config.get("num_train_timesteps", 1000))
    return DDIMScheduler(**shared, timestep_spacing="trailing", clip_sample=False)


def _flow(config: dict[str, Any], fresh: bool) -> Any:
    shift = float(config.get("shift", config.get("flow_shift", 1.0)))
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=fresh)


def _call(scheduler: Any, table: Table, flow: bool) -> dict[str, Any]:
    """Arguments of set_timesteps that lead to the table's times: the number alone where that is enough."""
    steps, wanted = len(table), table.timesteps.astype(np.float64)
    scale = scheduler.config.num_train_timesteps if flow else 1
    scheduler.set_timesteps(steps)
    if np.allclose(scheduler.timesteps.numpy() / scale, wanted, atol=1e-4 if flow else 0):
        return {"num_inference_steps": steps}
    if flow:
        shift = float(scheduler.config.shift)
        sigmas = wanted / (shift - (shift - 1) * wanted)  # the scheduler shifts them again
        return {"sigmas": [round(float(s), 6) for s in sigmas]}
    if isinstance(scheduler, LCMScheduler):
        return {"timesteps": [int(t) for t in wanted]}
    raise StepsError(
        f"diffusers' DDIM stands at {scheduler.timesteps.tolist()} for {steps} steps, this student at "
        f"{wanted.tolist()}; train on the trailing grid, or with sampler: stochastic"
    )


def worst_step(scheduler: Any, table: Table) -> float:
    """The largest relative difference of a step of the scheduler, set to the table's times, from its row.

    Schedulers draw their noise from torch's own generator, which is seeded before each step and again for ours.
    """
    generator, worst, shape = torch.Generator().manual_seed(0), 0.0, (1, 4, 8, 8)
    with torch.random.fork_rng(devices=[]):
        for index, row in enumerate(torch.from_numpy(table.rows)):
            x, m = (torch.randn(shape, generator=generator) for _ in range(2))
            torch.manual_seed(index)
            found = scheduler.step(m, scheduler.timesteps[index], x, return_dict=False)[0]
            torch.manual_seed(index)
            p, q, u, y, w = row.tolist()
            expected = u * (p * x + q * m) + y * x + w * torch.randn(shape)
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def write_scheduler(scheduler: Any, calls: dict[int, dict[str, Any]], folder: Path) -> None:
    """scheduler_config.json, with the times of every number of steps under ``_timesteps``."""
    scheduler.save_pretrained(folder)
    path = folder / "scheduler_config.json"
    times = {}
    for steps, call in calls.items():
        scheduler.set_timesteps(**call)
        times[str(steps)] = [round(float(t), 4) for t in scheduler.timesteps]
    path.write_text(json.dumps(json.loads(path.read_text()) | {TIMESTEPS: times}, indent=2) + "\n")
