"""diffusers' schedulers take the student's steps, and those that would not are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from distill.bundle import Manifest, Sampler
from distill.export.steps import StepsError, scheduler_for, worst_step, write_scheduler
from distill.families.schedulers import PREDICTION_TYPES
from distill.sampling import Flow, ScaledLinear, Table, ode_table, student_table

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def with_samplers(manifest: Manifest, prediction: str, tables: dict[int, Table]) -> Manifest:
    samplers = {n: Sampler.of(table) for n, table in tables.items()}
    return manifest.model_copy(update={"prediction": prediction, "samplers": samplers, "default_steps": max(samplers)})


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_lcm_takes_the_steps_of_discrete_students(manifest: Manifest, prediction: str) -> None:
    schedule = ScaledLinear(zero_terminal=prediction == "v")
    tables = {n: student_table(schedule, prediction, schedule.grid(n)) for n in (1, 2, 4, 8)}
    config = BETAS | {
        "prediction_type": PREDICTION_TYPES[prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal,
    }
    scheduler, calls = scheduler_for(with_samplers(manifest, prediction, tables), config)
    assert isinstance(scheduler, LCMScheduler)
    assert calls == {n: {"num_inference_steps": n} for n in tables}


def test_grids_of_their_own_are_named_by_their_times(manifest: Manifest) -> None:
    """SDXL's one step at 399 (DMD2), and grids that LCM's rounding does not hit."""
    schedule = ScaledLinear()
    tables = {1: student_table(schedule, "epsilon", np.array([399.0]))}
    tables[3] = student_table(schedule, "epsilon", np.array([999.0, 700.0, 250.0]))
    scheduler, calls = scheduler_for(with_samplers(manifest, "epsilon", tables), BETAS)
    assert isinstance(scheduler, LCMScheduler)
    assert calls == {1: {"timesteps": [399]}, 3: {"timesteps": [999, 700, 250]}}


def test_ddim_takes_deterministic_steps(manifest: Manifest) -> None:
    tables = {n: ode_table(ScaledLinear(), "epsilon", n) for n in (4, 8)}
    scheduler, calls = scheduler_for(with_samplers(manifest, "epsilon", tables), BETAS)
    assert isinstance(scheduler, DDIMScheduler) and calls[8] == {"num_inference_steps": 8}


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("fresh", [True, False])
def test_euler_takes_the_steps_of_flows(manifest: Manifest, shift: float, fresh: bool) -> None:
    schedule = Flow(shift=shift)
    tables = {
        n: student_table(schedule, "flow", schedule.grid(n)) if fresh else ode_table(schedule, "flow", n)
        for n in (2, 4)
    }
    scheduler, calls = scheduler_for(with_samplers(manifest, "flow", tables), {"shift": shift})
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert scheduler.config.stochastic_sampling is fresh
    assert calls[4] == {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    scheduler.set_timesteps(**calls[4])
    np.testing.assert_allclose(scheduler.timesteps.numpy() / 1000, tables[4].timesteps, atol=1e-6)


def test_steps_that_differ_are_measured_and_refused(manifest: Manifest) -> None:
    schedule = ScaledLinear()
    table = student_table(schedule, "epsilon", schedule.grid(4))
    scheduler: Any = LCMScheduler(**BETAS, original_inference_steps=1000)
    scheduler.set_timesteps(4)
    assert worst_step(scheduler, table) < 1e-4
    rows = table.rows.copy()
    rows[3, 2] *= 1.02
    scheduler.set_timesteps(4)
    assert worst_step(scheduler, Table(table.timesteps, rows)) == pytest.approx(0.02, rel=0.2)
    changed = with_samplers(manifest, "epsilon", {4: Table(table.timesteps, rows)})
    with pytest.raises(StepsError, match=r"LCMScheduler takes other steps than this student's 4 \(relative error 0\.0"):
        scheduler_for(changed, BETAS)


def test_deterministic_steps_on_another_grid_are_refused(manifest: Manifest) -> None:
    schedule = ScaledLinear(grids={3: (999.0, 700.0, 250.0)})
    uneven = with_samplers(manifest, "epsilon", {3: ode_table(schedule, "epsilon", 3)})
    with pytest.raises(
        StepsError, match=r"DDIM stands at \[999, 666, 332\] for 3 steps, this student at \[999\.0, 700"
    ):
        scheduler_for(uneven, BETAS)


def test_the_config_keeps_the_times_and_loads_without_a_word(manifest: Manifest, tmp_path: Path) -> None:
    schedule = ScaledLinear()
    tables = {4: student_table(schedule, "epsilon", schedule.grid(4))}
    tables[1] = student_table(schedule, "epsilon", np.array([399.0]))
    write_scheduler(*scheduler_for(with_samplers(manifest, "epsilon", tables), BETAS), tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_timesteps"] == {"1": [399], "4": [999, 749, 499, 249]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again: Any = LCMScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    assert again.timesteps.tolist() == [999, 749, 499, 249]
