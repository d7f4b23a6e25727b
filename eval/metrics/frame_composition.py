"""Compositional accuracy of clips: in how many frames is what the caption says, and nothing else?

    a = mean over frames of 1[the frame shows exactly the caption's things]

Frames are judged as eval.metrics.composition judges pictures: by the labeller of stills, which no model is trained on.
Relations that captions of moving scenes state hold all the time. To keep it cheap, ``frames`` of a clip are looked at,
the first, the last and evenly between. The interval is a bootstrap over prompts of each clip's share.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.data.captions import ATTRIBUTES
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.composition import Labeller, judge, load_labeller
from eval.statistics import bootstrap_mean


@register
class FrameComposition(PerSampleMetric):
    """Mean share of right frames."""

    name = "frame-composition"
    direction = "higher"
    unit = "%"
    smallest_n = 200
    media = "clips"

    def __init__(
        self, folder: Path | None = None, frames: int = 5, labeller: Labeller | None = None, identity: str = ""
    ) -> None:
        super().__init__()
        self._labeller, self._identity = (labeller, identity) if labeller else load_labeller(folder)
        self._frames = frames
        self._shares: list[dict[str, float]] = []
        self._rates: list[dict[str, float | None]] = []

    def update(self, samples: Samples) -> None:
        import torch

        chosen = spread(samples.images.shape[1], self._frames)
        pictures = samples.images[:, chosen].reshape(-1, *samples.images.shape[2:])
        found = self._labeller.detect(torch.from_numpy(pictures))
        values = []
        for i, prompt in enumerate(samples.prompts):
            if prompt.caption is None:
                raise EvalError(f"prompt {prompt.id!r} has no facts to compare with; use a suite of a world")
            frames = found[i * self._frames : (i + 1) * self._frames]
            verdicts = [judge(seen, prompt.caption) for seen in frames]
            right = [verdict.right for verdict in verdicts]
            values.append(100.0 * float(np.mean(right)))
            self._shares.append({"every frame": all(right), "first": right[0], "last": right[-1]})
            self._rates += [{"count": float(verdict.count), **verdict.rates} for verdict in verdicts]
        self._add(np.array(values), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        parts = {name: float(np.mean([shares[name] for shares in self._shares])) for name in self._shares[0]}
        for kind in ("count", *ATTRIBUTES, "relation"):
            stated = [rate for rates in self._rates if (rate := rates[kind]) is not None]
            if stated:
                parts[kind] = float(np.mean(stated))
        protocol = {"labeller": self._identity, "rule": "exact things, stated relations", "frames": self._frames}
        return self._score(bootstrap_mean(values, self._clusters), values, protocol, parts=parts).check()


def spread(length: int, count: int) -> list[int]:
    """``count`` of ``length`` frames: the first, the last and evenly between. Raises EvalError for shorter clips."""
    if not 2 <= count <= length:
        raise EvalError(f"frames is {count} of clips of {length}; use 2 to {length}")
    return [int(place) for place in np.linspace(0, length - 1, count).round()]
