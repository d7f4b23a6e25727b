"""What several tests of distances share: a truth of given pictures, and a list as torch-fidelity takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics.extractors import Extractor


class Fixed:
    """A truth of given pictures."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    @property
    def protocol(self) -> dict[str, Any]:
        return {"pictures": len(self.images)}

    def features(self, extractor: Extractor, size: int) -> np.ndarray:
        return extractor(self.images).astype(np.float64)


class Listed(torch.utils.data.Dataset[Tensor]):
    """What torch-fidelity takes as an input."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
