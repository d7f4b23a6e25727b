"""What several tasks share: batches of scenes and their captions, and pictures as floats."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.parallel.device import device
from distill.trainer import seeded


def batch_indices(seed: int, iteration: int, micro: int, size: int, count: int) -> NDArray[np.int64]:
    """Indices of one micro-batch: uniform draws that depend on (seed, iteration, micro) alone."""
    return seeded(seed, iteration, micro, "data").integers(0, count, size)


def to_float(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [−1, 1]."""
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    return tensor.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """float [−1, 1] to uint8 [0, 255], rounded."""
    return (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode without gradients."""
    return module.eval().requires_grad_(False)


def save_half(model: Any, folder: Path) -> None:
    """Write a diffusers or transformers model in float16, to be computed in float32: its config names float32."""
    copy.deepcopy(model).cpu().half().save_pretrained(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    if "dtype" in content:
        content["dtype"] = "float32"
        config.write_text(json.dumps(content, indent=2) + "\n")


def autocast(precision: str) -> torch.autocast:
    """Mixed precision for forward passes; float32 leaves everything as it is."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
