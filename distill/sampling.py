"""Samplers as tables of numbers, and noise that depends on a seed alone. No torch: the service imports this.

Every sampler that Leapfrog uses is affine in the current latents x, the network's output m and fresh noise z:

    x0 = p·x + q·m          the clean estimate
    x' = u·x0 + y·x + w·z   the latents of the next step

so one step is one row (p, q, u, y, w) beside its timestep, rows of one batch may stand at different steps, and a
runtime needs no scheduler code. Rows are computed in float64 and stored as float32.

Time is in the model's own units: 0 … 999 for variance-preserving models (SDXL), [0, 1] with 1 = noise for flows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
COEFFICIENTS = ("p", "q", "u", "y", "w")
PREDICTIONS = ("epsilon", "x0", "v", "flow")
Grids = Mapping[int, tuple[float, ...]]
"""Times by number of steps where they are not the schedule's own: {1: (399.0,)} for SDXL in one step."""


class Schedule(Protocol):
    """Noise schedule x_t = α(t)·x0 + σ(t)·ε in the model's own time."""

    @property
    def t_max(self) -> float: ...

    @property
    def t_first(self) -> float:
        """Where a student's first step stands."""
        ...

    def alpha(self, t: Array) -> Array: ...

    def sigma(self, t: Array) -> Array: ...

    def grid(self, steps: int) -> Array: ...


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's and SDXL's discrete schedule: √β linear from 0.00085 to 0.012 in 1000 steps.

    zero_terminal: √ᾱ shifted and scaled so that the last timestep is pure noise (Lin et al., arXiv 2305.08891,
    algorithm 1). Samplers start from pure noise; without it training never sees any, and what shines through at
    timestep 999 (√ᾱ = 0.068) is enough to learn the layout from. Needs v-prediction: at ᾱ = 0, ε says nothing of x0.
    linear: β itself is linear, as in DDPM and DiT, from 0.0001 to 0.02 there.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_terminal: bool = False
    linear: bool = False
    grids: Grids = field(default_factory=dict, hash=False)

    @property
    def t_max(self) -> float:
        return float(self.num_timesteps - 1)

    @property
    def t_first(self) -> float:
        return max((times[0] for times in self.grids.values()), default=self.t_max)

    @property
    def alphas_cumprod(self) -> Array:
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2
        if self.linear:
            betas = np.linspace(self.beta_start, self.beta_end, self.num_timesteps)
        cumulative = np.cumprod(1.0 - betas)
        if not self.zero_terminal:
            return np.asarray(cumulative)
        root = np.sqrt(cumulative)
        return np.asarray(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

    def alpha(self, t: Array) -> Array:
        return np.asarray(np.sqrt(self.alphas_cumprod[np.asarray(t, dtype=np.int64)]))

    def sigma(self, t: Array) -> Array:
        return np.asarray(np.sqrt(1.0 - self.alphas_cumprod[np.asarray(t, dtype=np.int64)]))

    def grid(self, steps: int) -> Array:
        """Trailing spacing: 999, 749, 499, 249 for four steps, unless ``grids`` has other times."""
        _check_steps(steps)
        if steps in self.grids:
            return np.asarray(self.grids[steps], dtype=np.float64)
        return np.asarray(np.round(np.arange(steps, 0, -1) * self.num_timesteps / steps) - 1.0)


@dataclass(frozen=True)
class Flow:
    """Rectified flow x_t = (1 − t)·x0 + t·ε with a time shift s: t ← s·t / (1 + (s − 1)·t)."""

    shift: float = 1.0

    t_max: float = 1.0

    grids: Grids = field(default_factory=dict, hash=False)

    @property
    def t_first(self) -> float:
        return max((times[0] for times in self.grids.values()), default=self.t_max)

    def alpha(self, t: Array) -> Array:
        return np.asarray(1.0 - np.asarray(t, dtype=np.float64))

    def sigma(self, t: Array) -> Array:
        return np.asarray(t, dtype=np.float64)

    def grid(self, steps: int) -> Array:
        """Uniform times 1, 1 − 1/n, …, 1/n, then shifted: 1, 0.9375, 0.8333, 0.625 for four steps with shift 5.

        ``grids`` holds shifted times already.
        """
        _check_steps(steps)
        if steps in self.grids:
            return np.asarray(self.grids[steps], dtype=np.float64)
        return self.warp(np.arange(steps, 0, -1) / steps)

    def warp(self, u: Array) -> Array:
        """Shifted times of uniform ones in [0, 1]."""
        u = np.asarray(u, dtype=np.float64)
        return np.asarray(self.shift * u / (1.0 + (self.shift - 1.0) * u))

    def unwarp(self, t: Array) -> Array:
        """The inverse of ``warp``."""
        t = np.asarray(t, dtype=np.float64)
        return np.asarray(t / (self.shift - (self.shift - 1.0) * t))


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps is {steps}; use a number from 1 to 1000")


def x0_coefficients(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(p, q) with x0 = p·x_t + q·m for a network that predicts m.

    epsilon: (x_t − σ·m)/α;  x0: m;  v = α·ε − σ·x0: α·x_t − σ·m;  flow m = ε − x0: x_t − σ·m (α = 1 − σ).
    """
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        return alpha, -sigma
    if prediction == "flow":
        return np.ones_like(alpha), -sigma
    raise ValueError(f"prediction is {prediction!r}; use one of {', '.join(PREDICTIONS)}")


@dataclass(frozen=True)
class Table:
    """One sampler: timesteps (N,) and rows (N, 5) float32 in the order of COEFFICIENTS."""

    timesteps: NDArray[np.float32]
    rows: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.rows.shape != (len(self.timesteps), len(COEFFICIENTS)):
            raise ValueError(
                f"rows has shape {self.rows.shape} for {len(self.timesteps)} timesteps; "
                f"give one row of {len(COEFFICIENTS)} coefficients per timestep"
            )

    def __len__(self) -> int:
        return len(self.timesteps)


def _table(timesteps: Array, columns: tuple[Array, ...]) -> Table:
    return Table(timesteps.astype(np.float32), np.stack(columns, axis=1).astype(np.float32))


def student_table(schedule: Schedule, prediction: str, timesteps: Array) -> Table:
    """The few-step sampler of DMD2 and LCM: predict x0, then noise it to the next timestep with fresh noise.

    x' = α(t')·x0 + σ(t')·z; after the last step x' = x0.
    """
    t = np.asarray(timesteps, dtype=np.float64)
    p, q = x0_coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    u = np.append(schedule.alpha(t[1:]), 1.0)
    w = np.append(schedule.sigma(t[1:]), 0.0)
    return _table(t, (p, q, u, np.zeros_like(u), w))


def ode_table(schedule: Schedule, prediction: str, steps: int) -> Table:
    """The teacher's deterministic sampler: DDIM with η = 0, which for flows is Euler's method.

    x' = α'·x0 + σ'·ε with ε = (x − α·x0)/σ, that is u = α' − σ'·α/σ and y = σ'/σ; after the last step x' = x0.
    """
    t = schedule.grid(steps)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    p, q = x0_coefficients(prediction, alpha, sigma)
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    y = sigma_next / sigma
    return _table(t, (p, q, alpha_next - y * alpha, y, np.zeros_like(y)))


def noise(seed: int, row: int, shape: tuple[int, ...], draws: int = 1) -> NDArray[np.float32]:
    """Standard normal noise (draws, *shape) float32 of one picture, drawn on the CPU from (seed, row) alone.

    Draw 0 is the initial latents, draw k the fresh noise after step k; asking for fewer draws gives a prefix.
    """
    generator = np.random.default_rng((seed, row))
    return generator.standard_normal((draws, *shape), dtype=np.float32)
