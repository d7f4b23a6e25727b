"""Where this process computes, and how what is drawn on the host gets there.

    LEAPFROG_DEVICE=cpu python -m distill.run recipes/NAME.yaml     # the CPU of a machine that has a GPU

Whatever is random is drawn by generators of the host and then moved, so that a seed means the same noise on every
machine. Tensors of a rollout lie on one device; hooks make theirs where the rollout's samples are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def device() -> torch.device:
    """A GPU per rank where there is CUDA, else the CPU."""
    name = os.environ.get("LEAPFROG_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)


def prepare(place: torch.device) -> None:
    """Settings of a GPU for the whole process: the current device, TF32 for products in float32, tried algorithms.

    Shapes are the same in every iteration, so cuDNN's search pays; what it finds may differ between runs by rounding.
    """
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.benchmark = True


def moved(tensor: Tensor, place: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device has still to do.

    Memory of the host that is not pinned is staged before the copy returns, so the source may be dropped at once.
    """
    return tensor.to(place, non_blocking=True)


def normal(shape: Sequence[int], rng: torch.Generator, place: torch.device) -> Tensor:
    """Standard normal noise, float32, by a generator of the host."""
    return moved(torch.randn(*shape, generator=rng), place)


def uniform(n: int, rng: torch.Generator, place: torch.device) -> Tensor:
    """n uniform numbers in [0, 1), float64, by a generator of the host."""
    return moved(torch.rand(n, generator=rng, dtype=torch.float64), place)
