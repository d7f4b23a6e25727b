"""Tables of sampler rows against float64 formulas of the papers and against diffusers' scheduler objects."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from numpy.typing import NDArray

from distill.families.schedulers import PREDICTION_TYPES
from distill.sampling import Flow, ScaledLinear, Table, noise, ode_table, student_table, x0_coefficients

SDXL: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 4)


def apply(table: Table, step: int, x: NDArray[Any], m: NDArray[Any], z: NDArray[Any]) -> tuple[Any, Any]:
    """(x', x0) of one row in float64."""
    p, q, u, y, w = table.rows[step].astype(np.float64)
    x0 = p * x + q * m
    return u * x0 + y * x + w * z, x0


def alpha_sigma(t: float) -> tuple[float, float]:
    """Ho et al. 2020: ᾱ_t is the product of 1 − β; Stable Diffusion's √β is linear. One factor at a time."""
    product = 1.0
    for i in range(int(t) + 1):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        product *= 1 - root * root
    return math.sqrt(product), math.sqrt(1 - product)


def test_schedule_is_the_product_of_its_betas() -> None:
    for t in (0, 1, 249, 500, 999):
        alpha, sigma = alpha_sigma(t)
        assert ScaledLinear().alpha(np.array(t)) == pytest.approx(alpha, rel=1e-12)
        assert ScaledLinear().sigma(np.array(t)) == pytest.approx(sigma, rel=1e-12)


def test_a_zero_terminal_schedule_ends_in_pure_noise_and_keeps_its_first_timestep() -> None:
    schedule, plain = ScaledLinear(zero_terminal=True), ScaledLinear()
    assert schedule.alpha(np.array(999)) == 0 and schedule.sigma(np.array(999)) == 1
    assert schedule.alpha(np.array(0)) == pytest.approx(plain.alpha(np.array(0)), rel=1e-12)
    assert bool((np.diff(schedule.alpha(np.arange(1000))) < 0).all())


def test_grids_start_at_pure_noise_and_are_evenly_spaced() -> None:
    np.testing.assert_array_equal(ScaledLinear().grid(4), [999, 749, 499, 249])
    np.testing.assert_array_equal(ScaledLinear().grid(1), [999])
    np.testing.assert_allclose(Flow().grid(4), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(Flow(shift=3.0).grid(2), [1, 0.75])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(steps: int) -> None:
    for schedule in (ScaledLinear(), Flow()):
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            schedule.grid(steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_student_row_predicts_the_clean_picture_and_noises_it_again(
    prediction: str, steps: int, rng: np.random.Generator
) -> None:
    """DMD2, Yin et al. 2024, section 4.3: x̂0 = (x − σ·ε̂)/α, then x' = α'·x̂0 + σ'·z; v of Salimans and Ho 2022."""
    schedule = ScaledLinear()
    table = student_table(schedule, prediction, schedule.grid(steps))
    times = [*schedule.grid(steps), None]
    for i in range(steps):
        alpha, sigma = alpha_sigma(times[i])
        alpha_next, sigma_next = (1.0, 0.0) if times[i + 1] is None else alpha_sigma(times[i + 1])
        x0, epsilon, z = rng.standard_normal((3, *SHAPE))
        x = alpha * x0 + sigma * epsilon
        output = epsilon if prediction == "epsilon" else alpha * epsilon - sigma * x0
        found, clean = apply(table, i, x, output, z)
        np.testing.assert_allclose(clean, x0, atol=2e-5)
        np.testing.assert_allclose(found, alpha_next * x0 + sigma_next * z, atol=2e-5)


def test_student_row_of_a_flow(rng: np.random.Generator) -> None:
    """Liu et al. 2022: x_t = (1 − t)·x0 + t·ε and the network predicts ε − x0."""
    times = np.array([1.0, 0.9, 0.4])
    table = student_table(Flow(), "flow", times)
    for i, t in enumerate(times):
        t_next = times[i + 1] if i < 2 else 0.0
        x0, epsilon, z = rng.standard_normal((3, *SHAPE))
        found, clean = apply(table, i, (1 - t) * x0 + t * epsilon, epsilon - x0, z)
        np.testing.assert_allclose(clean, x0, atol=1e-6)
        np.testing.assert_allclose(found, (1 - t_next) * x0 + t_next * z, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "zero"),
    [("epsilon", False), ("sample", False), ("sample", True), ("v_prediction", False), ("v_prediction", True)],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_ode_table_is_ddim(prediction: str, zero: bool, steps: int, rng: np.random.Generator) -> None:
    """DDIM with trailing spacing and η = 0, to 1e-5 of its float32 arithmetic.

    set_alpha_to_one is True, because the table ends at α = 1, the clean picture; SDXL's own configuration ends at the
    first timestep, where α = 0.9996, and so leaves that much noise in the result.
    """
    scheduler = DDIMScheduler(
        **SDXL, prediction_type=prediction, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
        rescale_betas_zero_snr=zero,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    ours = {theirs: name for name, theirs in PREDICTION_TYPES.items()}[prediction]
    table = ode_table(ScaledLinear(zero_terminal=zero), ours, steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    for i, t in enumerate(scheduler.timesteps):
        x, m = rng.standard_normal((2, *SHAPE))
        expected = scheduler.step(torch.from_numpy(m), t, torch.from_numpy(x), eta=0.0)
        found, clean = apply(table, i, x, m, np.ones(SHAPE))  # η = 0: fresh noise has no weight
        scale = np.abs(expected.pred_original_sample.numpy()).max()
        np.testing.assert_allclose(clean, expected.pred_original_sample, atol=1e-5 * scale)
        np.testing.assert_allclose(found, expected.prev_sample, atol=1e-5 * scale)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_ode_table_of_a_flow_is_euler(shift: float, steps: int, rng: np.random.Generator) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    table = ode_table(Flow(shift), "flow", steps)
    np.testing.assert_allclose(table.timesteps * 1000, scheduler.timesteps, rtol=1e-6)
    for i, t in enumerate(scheduler.timesteps):
        x, m = rng.standard_normal((2, *SHAPE))
        expected = scheduler.step(torch.from_numpy(m), t, torch.from_numpy(x)).prev_sample
        found, _ = apply(table, i, x, m, np.ones(SHAPE))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_student_table_replays_lcm_where_its_boundary_has_vanished(steps: int, rng: np.random.Generator) -> None:
    """LCM mixes c_skip·x into the estimate; at its timestep scaling of 10, c_skip is below 1e-7 for t ≥ 249."""
    schedule = ScaledLinear()
    scheduler = LCMScheduler(**SDXL, original_inference_steps=1000)
    scheduler.set_timesteps(steps)
    table = student_table(schedule, "epsilon", schedule.grid(steps))
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    drawn = torch.Generator().manual_seed(3)
    replayed = torch.Generator().manual_seed(3)
    for i, t in enumerate(scheduler.timesteps):
        x, m = rng.standard_normal((2, *SHAPE))
        expected = scheduler.step(torch.from_numpy(m), t, torch.from_numpy(x), generator=drawn)
        last = i == steps - 1
        z = np.zeros(SHAPE) if last else torch.randn(SHAPE, generator=replayed, dtype=torch.float64).numpy()
        found, clean = apply(table, i, x, m, z)
        scale = np.abs(clean).max()
        np.testing.assert_allclose(clean, expected.denoised, atol=1e-5 * scale)
        np.testing.assert_allclose(found, expected.prev_sample, atol=1e-5 * scale)


def test_perfect_network_carries_the_ode_to_its_clean_picture(rng: np.random.Generator) -> None:
    """With one picture in the world, ε̂ = (x − α·x0)/σ, and every number of steps ends on it."""
    x0 = rng.standard_normal(SHAPE)
    schedule = ScaledLinear()
    for steps in (1, 3, 10):
        table = ode_table(schedule, "epsilon", steps)
        x = rng.standard_normal(SHAPE)
        for i, t in enumerate(table.timesteps):
            alpha, sigma = alpha_sigma(t)
            x, _ = apply(table, i, x, (x - alpha * x0) / sigma, np.zeros(SHAPE))
        np.testing.assert_allclose(x, x0, atol=1e-4)


def test_a_grid_of_ones_own_replaces_that_number_of_steps_alone() -> None:
    schedule = ScaledLinear(grids={1: (399.0,)})
    assert schedule.grid(1).tolist() == [399.0] and schedule.grid(2).tolist() == [999.0, 499.0]
    assert (schedule.t_first, ScaledLinear().t_first) == (399.0, 999.0)
    table = student_table(schedule, "epsilon", schedule.grid(1))
    p, q, u, _, w = table.rows[0].tolist()
    # At t = 399 with √ᾱ = 0.65275 and √(1 − ᾱ) = 0.75757, from pure noise, straight to the clean picture.
    assert (p, q, u, w) == pytest.approx((1 / 0.65275, -0.75757 / 0.65275, 1, 0), abs=1e-4)
    flow = Flow(5.0, grids={2: (1.0, 0.5)})
    assert flow.grid(2).tolist() == [1.0, 0.5] and flow.t_first == 1.0
    assert hash(flow) == hash(Flow(5.0)) and flow != Flow(5.0)


def test_a_shift_warps_times_and_back() -> None:
    flow, u = Flow(5.0), np.linspace(0, 1, 11)
    assert flow.warp(np.array([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() == pytest.approx([0, 0.625, 5 / 6, 0.9375, 1])
    np.testing.assert_allclose(flow.unwarp(flow.warp(u)), u, atol=1e-12)
    assert Flow().warp(u).tolist() == u.tolist() == Flow().unwarp(u).tolist()


def test_a_linear_schedule_is_ddpms() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = ScaledLinear(1e-4, 0.02, linear=True)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)


def test_unknown_prediction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'noise'; use one of epsilon, x0, v, flow"):
        x0_coefficients("noise", np.ones(1), np.ones(1))


def test_table_refuses_rows_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\) for 1 timesteps"):
        Table(np.zeros(1, np.float32), np.zeros((1, 4), np.float32))


# --- noise -------------------------------------------------------------------------------------------------------


def test_fewer_draws_are_a_prefix_of_more() -> None:
    many = noise(7, 2, (4, 5, 5), draws=9)
    for draws in (1, 2, 5):
        np.testing.assert_array_equal(noise(7, 2, (4, 5, 5), draws=draws), many[:draws])
    assert many.shape == (9, 4, 5, 5) and many.dtype == np.float32


def test_noise_depends_on_seed_and_row_alone() -> None:
    reference = noise(7, 2, (4, 5, 5))
    np.random.default_rng(0).standard_normal(100)
    noise(8, 2, (4, 5, 5))
    np.testing.assert_array_equal(noise(7, 2, (4, 5, 5)), reference)
    for seed, row in ((8, 2), (7, 3), (2, 7)):
        assert not np.any(noise(seed, row, (4, 5, 5)) == reference)


def test_rows_seeds_and_draws_are_independent_standard_normals() -> None:
    samples = np.stack([noise(seed, row, (5000,), draws=2) for seed in (0, 1) for row in (0, 1)]).reshape(8, 5000)
    correlation = samples @ samples.T / 5000
    np.testing.assert_allclose(correlation, np.eye(8), atol=0.1)
    np.testing.assert_allclose(samples.mean(1), 0, atol=0.07)


def test_noise_of_a_seed_never_changes() -> None:
    """A seed is a promise to users; if NumPy ever changes its stream, that has to be noticed."""
    expected = [0.14190717041492462, -1.6685079336166382, -1.3321080207824707, 0.5825534462928772]
    np.testing.assert_allclose(noise(42, 0, (4,))[0], expected, rtol=1e-6)
