"""Do different seeds of one prompt give different pictures? The detector of a student that ignores its seed.

    d_i = mean over the other seeds j of the same prompt of 1 − cos(f_i, f_j)

with f the features of a registered extractor; a prompt's diversity is the mean over its seeds, the score the mean over
prompts. 0 when all seeds of a prompt are one picture. The slot of DMD2's LPIPS diversity over several pictures of one
prompt (Yin et al. 2024, arXiv 2405.14867), with features in place of LPIPS.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.extractors import Extractor, load_extractor
from eval.statistics import bootstrap_mean


@register
class Diversity(PerSampleMetric):
    """Mean cosine distance between pictures of one prompt."""

    name = "diversity"
    direction = "higher"
    unit = ""
    smallest_n = 200

    def __init__(self, folder: Path | None = None, extractor: str | Extractor = "scenes-clip") -> None:
        super().__init__()
        self._extractor = load_extractor(folder, extractor) if isinstance(extractor, str) else extractor
        self._features: list[NDArray[np.float64]] = []

    def update(self, samples: Samples) -> None:
        self._features.extend(self._extractor(samples.images).astype(np.float64))
        self._clusters += [prompt.id for prompt in samples.prompts]

    def compute(self) -> Score:
        self._need(len(self._features), 2)
        by_prompt: dict[str, list[int]] = {}
        for position, prompt in enumerate(self._clusters):
            by_prompt.setdefault(prompt, []).append(position)
        alone = next((prompt for prompt, positions in by_prompt.items() if len(positions) < 2), None)
        if alone is not None:
            raise EvalError(
                f"diversity needs several seeds of every prompt and {alone} has one; use a suite with seeds_per_prompt "
                "of 2 or more, and --samples a multiple of it"
            )
        values = np.empty(len(self._features))
        for positions in by_prompt.values():
            values[positions] = _distances(np.stack([self._features[i] for i in positions]))
        counts = sorted({len(positions) for positions in by_prompt.values()})
        protocol = {"extractor": self._extractor.name, "weights": self._extractor.digest, "seeds": counts}
        return self._score(bootstrap_mean(values, self._clusters), values, protocol).check()


def _distances(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(k, d) -> (k,) mean cosine distance of each row to the others."""
    sizes = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(sizes == 0, 1, sizes)
    cosines = unit @ unit.T
    return np.asarray((1 - cosines).sum(axis=1) - (1 - np.diag(cosines))) / (len(features) - 1)
