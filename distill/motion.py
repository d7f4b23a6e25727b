"""The motion labeller: a small network, trained on exact labels, that says what moves in a clip of the scenes world.

It is the judge of motion accuracy, a held-out metric: no model is ever trained on its answers.

    labeller = MotionLabeller.load("models/scenes-motion")
    labeller.watch(clips)          # (B, 3, F, 64, 64) uint8 -> per clip a Movement
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.data.world import CAMERA_MOTIONS, COLOURS, MOTIONS, SHAPES, Scene
from distill.labeller import Judge

MOVEMENTS = (*MOTIONS, *CAMERA_MOTIONS[1:])
ANSWERS: tuple[tuple[str, tuple[str, ...]], ...] = (("motion", MOVEMENTS), ("shape", SHAPES), ("colour", COLOURS))


@dataclass(frozen=True)
class Movement:
    """What moves and how. shape and colour are the moving thing's; "" where the camera or nothing moves."""

    motion: str
    shape: str = ""
    colour: str = ""

    @classmethod
    def of(cls, scene: Scene) -> Movement:
        """The truth."""
        mover = next((thing for thing in scene.things if thing.motion != "still"), None)
        return cls(scene.motion) if mover is None else cls(scene.motion, mover.shape, mover.colour)


class ClipTrunk(nn.Module):
    """Convolutions over each frame, then over frames: (B, 3, F, H, W) to (B, 4·width, …), see ``grid``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(3, width, (1, 3, 3), (1, 2, 2)),
            nn.SiLU(),
            _conv(width, 2 * width, (1, 3, 3), (1, 2, 2)),
            nn.SiLU(),
            _conv(2 * width, 2 * width, (5, 3, 3), (2, 1, 1)),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            _conv(2 * width, 4 * width, (3, 3, 3), (2, 2, 2)),
            nn.GroupNorm(8, 4 * width),
            nn.SiLU(),
            _conv(4 * width, 4 * width, (3, 3, 3), (1, 1, 1)),
            nn.SiLU(),
        )

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips)  # type: ignore[no-any-return]

    @staticmethod
    def grid(frames: int, size: int) -> tuple[int, int, int]:
        """(frames, rows, columns) of what comes out: an eighth of the size and, rounded up, a quarter of the frames."""
        return -(-frames // 4), -(-size // 8), -(-size // 8)


class MotionLabeller(Judge):
    """Reads a maximum and a mean over all places and times."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.trunk = ClipTrunk(width)
        self.read = nn.Linear(8 * width, sum(len(values) for _, values in ANSWERS))

    def pooled(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [−1, 1] to what the answers are read from, (B, 8·width)."""
        seen = self.trunk(clips).flatten(2)
        return torch.cat((seen.amax(2), seen.mean(2)), 1)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """clips: (B, 3, F, H, W) in [−1, 1]. Returns logits (B, k) per answer."""
        logits = self.read(self.pooled(clips))
        parts = logits.split([len(values) for _, values in ANSWERS], 1)
        return {name: part for (name, _), part in zip(ANSWERS, parts, strict=True)}

    @torch.no_grad()
    def watch(self, clips: Tensor) -> list[Movement]:
        """What moves in each clip, (B, 3, F, H, W) uint8. Raises ValueError for anything else."""
        if clips.ndim != 5 or clips.dtype != torch.uint8:
            raise ValueError(f"clips is {tuple(clips.shape)} {clips.dtype}; give (B, 3, F, H, W) uint8")
        found = []
        for part in clips.split(32):
            out = self(part.float() / 127.5 - 1)
            for row in zip(*(out[name].argmax(1).tolist() for name, _ in ANSWERS), strict=True):
                motion, *mover = (values[i] for (_, values), i in zip(ANSWERS, row, strict=True))
                found.append(Movement(motion, *mover) if motion in MOTIONS[1:] else Movement(motion))
        return found


def _conv(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Conv3d:
    t, h, w = kernel
    return nn.Conv3d(inputs, outputs, kernel, stride, padding=(t // 2, h // 2, w // 2))
