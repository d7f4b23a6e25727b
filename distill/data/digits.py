"""scikit-learn's handwritten digits: 1,797 real scans of 8×8, with labels and a fixed split. Nothing is downloaded.

    from distill.data.digits import load_digits
    images, labels = load_digits("train")       # (1500, 1, 8, 8) float32 in [-1, 1], (1500,) int64

The data come from UCI's "Optical Recognition of Handwritten Digits" and ship inside scikit-learn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

NUM_CLASSES = 10
SIZE = 8
TRAIN_COUNT = 1500
_INK = 16.0
"""The scans count dark cells of 4×4: 0 … 16."""
_SPLIT_SEED = 20240


def load_digits(
    split: Literal["train", "held_out", "all"] = "train",
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (N, 1, 8, 8) float32 in [−1, 1], 1 = ink, and labels (N,) int64.

    split: "train" (1,500) and "held_out" (297) are disjoint and always the same, in a shuffled order; "all" is both.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split is {split!r}; use 'train', 'held_out' or 'all'")
    from sklearn.datasets import load_digits as scans

    pixels, labels = scans(return_X_y=True)
    images = (pixels.reshape(-1, 1, SIZE, SIZE) / (_INK / 2) - 1).astype(np.float32)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    chosen = {"train": order[:TRAIN_COUNT], "held_out": order[TRAIN_COUNT:], "all": order}[split]
    return images[chosen], labels[chosen].astype(np.int64)
