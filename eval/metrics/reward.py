"""A reward as a metric: the same code and weights that training uses, marked wherever training used it.

A reward of videos (``video``) judges clips, any other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval import judges
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean


class Scorer(Protocol):
    """A reward: score(images (B, 3, H, W) uint8, captions or labels) -> (B,). Of clips (B, 3, F, H, W) if ``video``."""

    name: str

    def score(self, images: Any, conditions: Sequence[Any]) -> Any: ...


@register
class Reward(PerSampleMetric):
    """Mean reward over prompts: 100 × cosine of picture, or clip, and caption for scenes, log p(label) for digits."""

    name = "reward"
    direction = "higher"
    unit = ""
    smallest_n = 200
    media = "any"

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
        self._styles: list[str] = []

    def update(self, samples: Samples) -> None:
        import torch

        films = getattr(self._scorer, "video", False)
        if films != (samples.frames is not None):
            kind = "clips" if films else "pictures"
            raise EvalError(f"the reward {self._scorer.name} judges {kind}, which these are not; name another judge")
        images = torch.from_numpy(samples.images)
        conditions = [prompt.text if prompt.label is None else prompt.label for prompt in samples.prompts]
        with torch.inference_mode():
            scores = self._scorer.score(images.transpose(1, 2) if films else images, conditions)
        self._add(np.asarray(scores, dtype=np.float64), samples)
        self._styles.extend(prompt.style for prompt in samples.prompts)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"reward": self._scorer.name, "weights": self._identity}
        interval = bootstrap_mean(values, self._clusters)
        return self._score(interval, values, protocol, parts=self._parts(values), trained_on=self._trained_on).check()

    def _parts(self, values: Any) -> dict[str, float]:
        """The mean of each style where prompts have one, as benchmarks report it."""
        styles = np.array(self._styles)
        return {style: float(values[styles == style].mean()) for style in dict.fromkeys(self._styles) if style}


def load_reward(folder: Path | None, judge: str) -> tuple[Scorer, str]:
    """The reward in a folder of judges and the digest of its files."""
    path = judges.find(folder, judge)
    from distill.rewards import load_reward as load

    try:
        return load(path), judges.digest(path)
    except (ValueError, OSError) as error:
        raise EvalError(f"{path} does not load as a reward: {error}") from None
