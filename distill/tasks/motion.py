"""Training of the motion labeller on exact labels of all attribute combinations, the held-out ones included.

python -m distill.run recipes/scenes-motion.yaml

A clip has its mirror image and its reversal, whose motions are known: four clips for the rendering of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.config import MotionRecipe
from distill.data.cache import HELD_OUT_SEED, scene_clips
from distill.data.world import sample_scene
from distill.motion import ANSWERS, MotionLabeller, Movement
from distill.parallel.device import device, moved
from distill.tasks.common import autocast, batch_indices, to_float
from distill.tasks.video import stills
from distill.trainer import Phase, Telemetry, generator, seeded

MIRRORED = {"left": "right", "right": "left", "pan left": "pan right", "pan right": "pan left"}
"""Motions in a mirror; the others look alike."""
REVERSED = MIRRORED | {"towards": "away", "away": "towards", "zoom in": "zoom out", "zoom out": "zoom in"}
"""Motions backwards in time; the others look alike."""
_NOT_ASKED = -1
_HELD_OUT_SEED = 2
_HELD_OUT_SHARE = 5
"""One clip in five shows a combination that the generators never see in training."""


def varied(clip: Tensor, truth: Movement, mirror: bool, backwards: bool) -> tuple[Tensor, Movement]:
    """A clip (3, F, H, W) and what moves in it, mirrored, reversed, or both."""
    motion = MIRRORED.get(truth.motion, truth.motion) if mirror else truth.motion
    motion = REVERSED.get(motion, motion) if backwards else motion
    dims = ([1] if backwards else []) + ([3] if mirror else [])
    return clip.flip(dims), Movement(motion, truth.shape, truth.colour)


def answers(truths: list[Movement]) -> Tensor:
    """Classes of what to answer, (B, answers) int64; −1 where there is no moving thing to describe."""
    rows = [
        [values.index(getattr(t, name)) if getattr(t, name) else _NOT_ASKED for name, values in ANSWERS] for t in truths
    ]
    return torch.tensor(rows)


class MotionTask:
    """Cross-entropy of the motion and of the moving thing's shape and colour."""

    def __init__(self, recipe: MotionRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.labeller = MotionLabeller(recipe.width).train().to(device())
        self.roles: dict[str, nn.Module] = {"labeller": self.labeller}
        self.optimizers = {"labeller": recipe.optimizer}
        data = recipe.data
        assert data.frames is not None
        self.clips = scene_clips(data.seed, data.count, data.frames, data.size)
        self.rare_count = max(1, data.count // _HELD_OUT_SHARE)
        self.rare = scene_clips(_HELD_OUT_SEED, self.rare_count, data.frames, data.size, "held_out")

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("labeller", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        clips, truths = self._draw(iteration, micro)
        truth = moved(answers(truths), device())
        with autocast(self.recipe.precision):
            out = self.labeller(moved(clips, device()))
        loss, values = torch.zeros((), device=truth.device), dict[str, Tensor | float]()
        for i, (name, _) in enumerate(ANSWERS):
            logits, asked = out[name].float(), truth[:, i] != _NOT_ASKED
            loss = loss + cross_entropy(logits, truth[:, i], ignore_index=_NOT_ASKED, reduction="sum") / len(truth)
            right = (logits.argmax(1) == truth[:, i]) & asked
            values[f"{name}/accuracy"] = right.sum() / asked.sum().clamp_min(1)
        return loss, values

    def _draw(self, iteration: int, micro: int) -> tuple[Tensor, list[Movement]]:
        """Clips with a little noise, mirrored and reversed at random, and what moves in them."""
        r = self.recipe
        index = batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count)
        rng, noise = seeded(r.seed, iteration, micro, "vary"), generator(r.seed, iteration, micro, "noise")
        clips, truths = [], []
        for i in index.tolist():
            rare = rng.random() * _HELD_OUT_SHARE < 1
            i = i % self.rare_count if rare else i
            seed, kind, source = (
                (_HELD_OUT_SEED, "held_out", self.rare) if rare else (r.data.seed, "trained", self.clips)
            )
            truth = Movement.of(sample_scene(seed, i, combinations=kind, moving=True))
            clip, truth = varied(to_float(source[i]), truth, bool(rng.integers(2)), bool(rng.integers(2)))
            clips.append(clip + 0.06 * float(rng.random()) * torch.randn(clip.shape, generator=noise))
            truths.append(truth)
        return torch.stack(clips), truths

    def preview(self) -> Tensor:
        return stills(torch.from_numpy(np.array(self.clips[:16])))

    def finish(self, output: Path) -> None:
        """Measure accuracy on held-out clips of both kinds of combinations, then save."""
        data, accuracy = self.recipe.data, {}
        assert data.frames is not None
        count = min(300, data.count)
        for combinations in ("trained", "held_out"):
            clips = torch.from_numpy(np.array(scene_clips(HELD_OUT_SEED, count, data.frames, data.size, combinations)))
            scenes = [sample_scene(HELD_OUT_SEED, i, combinations=combinations, moving=True) for i in range(count)]
            found, truths = self.labeller.watch(clips.to(device())), [Movement.of(scene) for scene in scenes]
            pairs = list(zip(found, truths, strict=True))
            accuracy[combinations] = sum(f.motion == t.motion for f, t in pairs) / count
            accuracy[f"{combinations}, of what"] = sum(f == t for f, t in pairs) / count
        print(f"motions labelled right: {accuracy}")
        self.labeller.save(output, accuracy)
