"""Judging digits: a small classifier, whose features serve FID and KID and whose answer serves accuracy.

    python -m eval.digits --out models/digits-cnn      # trains it in seconds and says how good it is

It has the architecture of the digits' reward but is another network: a student that learns to please its reward must
still convince this one. It is trained on the training scans and measured on the held-out ones; that accuracy is the
ceiling of every score that it gives and is kept beside its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.digits import SIZE, load_digits
from distill.rewards import DigitClassifier
from eval import judges
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.metrics.composition import proportion
from eval.metrics.extractors import register_extractor

NAME = "digits-cnn"
_EPOCHS, _BATCH, _LEARNING_RATE = 25, 100, 2e-3


class Features(nn.Module):
    """The classifier's penultimate layer, as a feature extractor: (B, 3, 8, 8) uint8 -> (B, 64)."""

    def __init__(self, model: DigitClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.features(scans(images))


def scans(images: Tensor) -> Tensor:
    if images.shape[-2:] != (SIZE, SIZE):
        height, width = images.shape[-2:]
        raise EvalError(f"pictures are {width}×{height} but digits are {SIZE}×{SIZE}; make them at that size")
    return images


def as_pictures(scans: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(N, 1, 8, 8) in [−1, 1] -> (N, 3, 8, 8) uint8, rounded as a bundle's decoder does."""
    return np.repeat(((scans + 1) * 127.5).round().clip(0, 255).astype(np.uint8), 3, axis=1)


def train(seed: int = 0, epochs: int = _EPOCHS) -> DigitClassifier:
    """A classifier of the training scans, shifted by up to one pixel; the same seed gives the same weights."""
    scans, labels = load_digits("train")
    pictures, targets = torch.from_numpy(as_pictures(scans)), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(name=NAME)
        optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
        for _ in range(epochs):
            for index in torch.randperm(len(pictures)).split(_BATCH):
                dx, dy = torch.randint(-1, 2, (2,)).tolist()
                shifted = torch.roll(pictures[index], (dy, dx), dims=(2, 3))
                loss = F.cross_entropy(model(shifted), targets[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def read(model: DigitClassifier, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(B,) the digit that each of (B, 3, H, W) uint8 shows."""
    with torch.inference_mode():
        answers: NDArray[np.int64] = model(scans(torch.tensor(pictures))).argmax(dim=1).numpy()
    return answers


def held_out_accuracy(model: DigitClassifier) -> tuple[int, int]:
    """How many held-out scans are classified rightly, and how many there are."""
    scans, labels = load_digits("held_out")
    return int(np.sum(read(model, as_pictures(scans)) == labels)), len(labels)


@register_extractor(NAME)
def load_features(path: Path) -> Features:
    """The feature extractor in a judge's folder."""
    return Features(load(path))


def load(path: Path) -> DigitClassifier:
    """The classifier in a judge's folder."""
    if not (path / "config.json").is_file():
        raise EvalError(f"{path / 'config.json'} is missing; make it with: python -m eval.digits --out {path}")
    return DigitClassifier.load(path)


@register
class DigitAccuracy(PerSampleMetric):
    """Share of pictures that the classifier reads as the digit that was asked for."""

    name = "digit-accuracy"
    direction = "higher"
    unit = "%"
    smallest_n = 200

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        path = judges.find(folder, NAME)
        self._model, self._identity = load(path), judges.digest(path)

    def update(self, samples: Samples) -> None:
        labels = [prompt.label for prompt in samples.prompts]
        if None in labels:
            raise EvalError("digit-accuracy needs prompts with labels; use a suite of world digits")
        self._add(100.0 * (read(self._model, samples.images) == np.array(labels)), samples)

    def compute(self) -> Score:
        self._need(len(self._values))
        values = np.array(self._values)
        return self._score(proportion(values, self._clusters), values, {"classifier": self._identity}).check()
