"""What every reward offers, and the check that all share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Reward(Protocol):
    """Scores pictures (B, 3, H, W) uint8 against prompts or labels; larger is better; (B,) float32."""

    name: str
    range: tuple[float, float]
    requires_grad: bool
    digest: str
    """sha256 of the weights file; "" for weights that were not read from one."""

    def score(self, images: Tensor, conditions: Sequence[Any]) -> Tensor: ...

    def score_pixels(self, pixels: Tensor, conditions: Sequence[Any]) -> Tensor:
        """The same of float pictures in [−1, 1], with a graph; only where ``requires_grad`` is true."""
        ...


def check_counts(images: Tensor, conditions: Sequence[Any], what: str) -> None:
    """Raises ValueError unless there is one condition per picture."""
    if len(images) != len(conditions):
        raise ValueError(f"{len(images)} pictures and {len(conditions)} {what}s; give one {what} per picture")
