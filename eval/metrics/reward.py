"""A reward as a metric: the same code and weights that training uses, marked wherever training used it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval import judges
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean


class Scorer(Protocol):
    """A reward: score(images (B, 3, H, W) uint8, prompts) -> (B,)."""

    name: str

    def score(self, images: Any, prompts: Sequence[str]) -> Any: ...


@register
class Reward(PerSampleMetric):
    """Mean reward over prompts, 100 × cosine of picture and caption for the embedded one."""

    name = "reward"
    direction = "higher"
    unit = "100·cos"
    smallest_n = 200

    def __init__(
        self,
        folder: Path | None = None,
        judge: str = "scenes-reward",
        scorer: Scorer | None = None,
        identity: str = "",
        trained_on: bool = False,
    ) -> None:
        super().__init__()
        self._scorer, self._identity = (scorer, identity) if scorer else load_reward(folder, judge)
        self._trained_on = trained_on

    def update(self, samples: Samples) -> None:
        import torch

        with torch.inference_mode():
            scores = self._scorer.score(torch.from_numpy(samples.images), [p.text for p in samples.prompts])
        self._add(np.asarray(scores, dtype=np.float64), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"reward": self._scorer.name, "weights": self._identity}
        interval = bootstrap_mean(values, self._clusters)
        return self._score(interval, values, protocol, trained_on=self._trained_on).check()


def load_reward(folder: Path | None, judge: str) -> tuple[Scorer, str]:
    """The reward in a folder of judges and the digest of its files."""
    path = judges.find(folder, judge)
    from distill.rewards import ClipReward

    return ClipReward.load(path), judges.digest(path)
