"""Smoothness: does a clip move as evenly as true clips of its motion do? In closed form, without a network.

    e = mean over pixels and times of (x_{t+1} − 2·x_t + x_{t−1})²         second differences, levels² of 255
    d = |log2(e + ½) − mean log2(e* + ½)|,   e* of true clips of the same motion

½ is what rounding to whole levels alone adds to e (6 errors of variance 1/12). d is in octaves: 0 for as much change of
speed as true clips have, 1 for twice or half as much; a frozen clip has too little and a flickering one too much. The
part "balance" is the mean of the signed logarithm, negative where clips are too still.

Beside it stands VBench's motion smoothness with linear interpolation in the place of AMT-S, which is not here: odd
frames are dropped and interpolated back, 1 − mean|difference|/255. It is highest for a frozen clip.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.motion import stated
from eval.metrics.references import ClipReference
from eval.prompts import EVALUATION_SEEDS
from eval.statistics import bootstrap_mean

ROUNDING = 0.5
"""Energy of the second differences of what rounding leaves, levels²."""


@register
class Jerk(PerSampleMetric):
    """Mean distance in octaves. reference: mean log2(e* + ½) by motion; of held-out scenes unless given."""

    name = "jerk"
    direction = "lower"
    unit = "octaves"
    smallest_n = 100
    media = "clips"

    def __init__(
        self,
        reference_seed: int = EVALUATION_SEEDS.stop - 1,
        reference_count: int = 1000,
        frames: int = 17,
        reference: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._truth = ClipReference(reference_seed, reference_count, frames)
        self._levels = reference
        self._protocol: dict[str, Any] = {"reference": reference or self._truth.protocol}
        self._signed: list[float] = []
        self._smoothness: list[float] = []

    def update(self, samples: Samples) -> None:
        if samples.frames is None or samples.frames < 3:
            raise EvalError(f"jerk needs clips of at least 3 frames and got {samples.frames}; use longer ones")
        if self._levels is None:
            if samples.frames != self._truth.frames:
                raise EvalError(f"jerk compares {self._truth.frames} frames and got {samples.frames}; set frames")
            self._levels = typical_energy(self._truth, samples.images.shape[-1])
        motions = []
        for prompt in samples.prompts:
            if prompt.caption is None or not prompt.moving:
                raise EvalError(f"prompt {prompt.id!r} says nothing of motion; use a suite of world moving-scenes")
            motions.append(stated(prompt.caption)[0])
        unseen = sorted(set(motions) - self._levels.keys())
        if unseen:
            raise EvalError(f"no true clip shows {unseen[0]!r} to compare with; raise reference_count")
        expected = np.array([self._levels[motion] for motion in motions])
        signed = np.log2(energy(samples.images) + ROUNDING) - expected
        self._signed += signed.tolist()
        self._smoothness += linear_smoothness(samples.images).tolist()
        self._add(np.abs(signed), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        parts = {"balance": float(np.mean(self._signed)), "linear smoothness": float(np.mean(self._smoothness))}
        return self._score(bootstrap_mean(values, self._clusters), values, self._protocol, parts=parts).check()


def energy(clips: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared second difference of clips (B, F, 3, H, W), (B,) in levels²."""
    x = clips.astype(np.int16)
    second = x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]
    return np.asarray(np.square(second.astype(np.float32)).reshape(len(x), -1).mean(axis=1), dtype=np.float64)


def linear_smoothness(clips: NDArray[np.uint8]) -> NDArray[np.float64]:
    """VBench's motion smoothness with a straight line between frames 0, 2, 4, … of clips (B, F, 3, H, W): (B,)."""
    x = clips[:, : clips.shape[1] - (clips.shape[1] + 1) % 2].astype(np.float32)
    apart = np.abs(x[:, 1::2] - (x[:, :-1:2] + x[:, 2::2]) / 2)
    return np.asarray(1 - apart.reshape(len(x), -1).mean(axis=1) / 255, dtype=np.float64)


def typical_energy(truth: ClipReference, size: int) -> dict[str, float]:
    """Mean log2(e + ½) of true clips by their motion."""
    from distill.data.world import sample_scene

    found: dict[str, list[float]] = {}
    for start in range(0, truth.count, 64):
        stop = min(start + 64, truth.count)
        levels = np.log2(energy(truth.clips(size, start, stop)) + ROUNDING)
        for i, level in zip(range(start, stop), levels, strict=True):
            found.setdefault(sample_scene(truth.seed, i, moving=True).motion, []).append(float(level))
    return {motion: float(np.mean(levels)) for motion, levels in found.items()}
