"""Motion accuracy: does the clip move as its caption says?

A labeller, trained on exact labels of clips of all combinations (models/scenes-motion), says what moves in a clip, of
MOTIONS and CAMERA_MOTIONS, and which thing it is. A clip is right when the motion is the caption's; beside it stands
how often the moving thing's shape and colour are right as well, and the share of each motion that is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.data.captions import Caption
from eval import judges
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.composition import proportion


class Moving(Protocol):
    """What moves; shape and colour are "" where it is the camera."""

    @property
    def motion(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def colour(self) -> str: ...


class Watcher(Protocol):
    def watch(self, clips: Any) -> Sequence[Moving]:
        """What moves in clips (B, 3, F, H, W) uint8."""


def stated(caption: Caption) -> tuple[str, str, str]:
    """(motion, shape, colour) of what a caption says to move; the camera has neither shape nor colour."""
    if caption.motion is None:
        return caption.camera, "", ""
    index, motion = caption.motion
    thing = next(thing for thing in caption.things if thing.index == index)
    return motion, thing.shape, thing.colour


@register
class MotionAccuracy(PerSampleMetric):
    """Share of clips that move as their caption says, with Wilson's interval."""

    name = "motion-accuracy"
    direction = "higher"
    unit = "%"
    smallest_n = 200
    media = "clips"

    def __init__(self, folder: Path | None = None, labeller: Watcher | None = None, identity: str = "") -> None:
        super().__init__()
        self._labeller, self._identity = (labeller, identity) if labeller else load_watcher(folder)
        self._motions: list[str] = []
        self._seen: list[str] = []
        self._same_thing: list[bool] = []

    def update(self, samples: Samples) -> None:
        import torch

        found = self._labeller.watch(torch.from_numpy(samples.images).transpose(1, 2))
        right = []
        for seen, prompt in zip(found, samples.prompts, strict=True):
            if prompt.caption is None or not prompt.moving:
                raise EvalError(f"prompt {prompt.id!r} says nothing of motion; use a suite of world moving-scenes")
            motion, shape, colour = stated(prompt.caption)
            right.append(seen.motion == motion)
            self._motions.append(motion)
            self._seen.append(seen.motion)
            self._same_thing.append((seen.motion, seen.shape, seen.colour) == (motion, shape, colour))
        self._add(100.0 * np.array(right), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values, asked = np.array(self._values), np.array(self._motions)
        parts = {"of the right thing": float(np.mean(self._same_thing))}
        parts |= {motion: float(values[asked == motion].mean()) / 100 for motion in sorted(set(self._motions))}
        parts["seen as still"] = float(np.mean([seen == "still" for seen in self._seen]))
        protocol = {"labeller": self._identity, "rule": "the stated motion"}
        return self._score(proportion(values, self._clusters), values, protocol, parts=parts).check()


def load_watcher(folder: Path | None) -> tuple[Watcher, str]:
    """The trained labeller of motion and the digest of its files."""
    path = judges.find(folder, "scenes-motion")
    from distill.motion import MotionLabeller

    return MotionLabeller.load(path), judges.digest(path)
