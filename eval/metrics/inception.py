"""Inception score where there is a classifier: pictures should be sure of their class, and classes evenly many.

    IS = exp( E_x KL( p(y|x) ‖ p(y) ) ),   p(y) = E_x p(y|x)      (Salimans et al. 2016, arXiv 1606.03498, eq. 1)

over all samples at once (one split), with the classifier of digits. The highest value is the number of classes. It
knows nothing of the reference and nothing of what was asked for; report it beside accuracy, never alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eval import judges
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.digits import NAME, load, scans
from eval.statistics import clustered_se, normal_interval


@register
class InceptionScore(PerSampleMetric):
    """exp of the mean divergence of a picture's class from the classes of all pictures."""

    name = "inception-score"
    direction = "higher"
    unit = ""
    smallest_n = 1_000

    def __init__(self, folder: Path | None = None, classifier: nn.Module | None = None, identity: str = "") -> None:
        super().__init__()
        if classifier is None:
            path = judges.find(folder, NAME)
            classifier, identity = load(path), judges.digest(path)
        self._classifier, self._identity = classifier, identity
        self._logits: list[NDArray[np.float32]] = []

    def update(self, samples: Samples) -> None:
        with torch.inference_mode():
            self._logits.append(self._classifier(scans(torch.tensor(samples.images))).numpy())
        self._clusters += [prompt.id for prompt in samples.prompts]

    def compute(self) -> Score:
        self._need(len(self._clusters), 2)
        value, influence = inception_score(np.concatenate(self._logits).astype(np.float64))
        interval = normal_interval(value, clustered_se(influence, self._clusters), len(set(self._clusters)))
        protocol = {"classifier": self._identity, "splits": 1, "n": len(influence)}
        return self._score(interval, influence, protocol, per_sample_kind="influence").check()


def inception_score(logits: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """(n, classes) logits -> the score and the influence of every sample on it, which sums to 0.

    The derivative of log IS when weight moves to x is KL(p(y|x) ‖ p(y)) − log IS: the change of p(y) drops out, because
    the mean divergence is smallest at the mean.
    """
    logs = logits - logits.max(axis=1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    p = np.exp(logs)
    mean = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)  # a class that nothing shows adds 0, not NaN
    divergence = (p * (logs - np.log(mean))).sum(axis=1)
    value = float(np.exp(divergence.mean()))
    influence = value * (divergence - divergence.mean())
    return value, influence
