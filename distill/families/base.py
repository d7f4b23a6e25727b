"""What a family of architectures must offer; objectives and the trainer know nothing else of a model.

A family owns what its roles share and never train (autoencoder, text encoders, schedule); a network (student,
teacher, fake) is passed to each call, so that one family serves every role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.parallel.device import moved
from distill.sampling import Flow, ScaledLinear, Schedule

Condition = dict[str, Tensor]
"""What a network is conditioned on, by input name; every tensor has the rows of the batch first."""


@dataclass(frozen=True)
class Prediction:
    """One network call in all three parametrisations, float32, (B, C, h, w); features by tap name."""

    x0: Tensor
    eps: Tensor
    v: Tensor
    features: dict[str, Tensor]


class Family(Protocol):
    """One architecture family: ``sdxl``, ``sd15``, ``sd3``, ``flux``, ``sit``, ``wan``.

    Videos have a frame axis: (B, C, F, h, w).
    """

    name: str
    prediction: str
    schedule: Schedule
    size: tuple[int, int]
    """(width, height) in pixels of what is trained."""

    def predict(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """x_t: (B, C, h, w) float32, t: (B,) in the model's own units."""
        ...

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What a network's forward takes, by name; ``predict`` and the dry run both call it so."""
        ...

    def new_network(self) -> nn.Module:
        """A fresh network for a teacher."""
        ...

    def encode(self, prompts: Sequence[Any]) -> Condition: ...

    def unconditional(self, n: int) -> Condition:
        """The input without a condition, as this family was trained for classifier-free guidance."""
        ...

    def blank(self, n: int) -> Condition:
        """A condition's shapes, without meaning."""
        ...

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """(C, h, w), or (C, F, h, w), of the latents of ``size`` = (width, height) pixels; None: the training size."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents in model scale to pictures (B, 3, H, W), or videos (B, 3, F, H, W), float32 in [−1, 1]."""
        ...

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        """Modules that fully sharded training wraps one by one."""
        ...

    def lora_targets(self) -> tuple[str, ...]: ...

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the diffusers folder of a network with everything that it needs."""
        ...

    def describe(self) -> dict[str, Any]:
        """The family's part of a bundle's manifest: family, task, prediction, sizes, latents, preview, …"""
        ...


def coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ), each (B,) float64, of times (B,) in the model's own units, where t is and without waiting for it."""
    if isinstance(schedule, Flow):
        return 1.0 - t.double(), t.double()
    assert isinstance(schedule, ScaledLinear), f"{type(schedule).__name__} is no schedule of ours"
    alpha, sigma = (moved(torch.from_numpy(column), t.device) for column in _columns(schedule))
    return alpha[t.long()], sigma[t.long()]


@lru_cache
def _columns(schedule: ScaledLinear) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """α and σ of every timestep."""
    times = np.arange(schedule.num_timesteps, dtype=np.float64)
    return schedule.alpha(times), schedule.sigma(times)


def preview_matrix(latents: Tensor, images: Tensor) -> tuple[tuple[float, float, float], ...]:
    """The linear map from latents to colours that fits best: rows for the channels, then a constant.

    latents: (B, C, h, w) in model scale; images: (B, 3, H, W) in [−1, 1].
    """
    small = nn.functional.adaptive_avg_pool2d(images.float(), (latents.shape[-2], latents.shape[-1]))
    x = latents.float().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    x = torch.cat((x, torch.ones(len(x), 1)), 1)
    y = small.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).reshape(-1, 3)
    solution = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0]
    return tuple((round(float(r), 5), round(float(g), 5), round(float(b), 5)) for r, g, b in solution)
