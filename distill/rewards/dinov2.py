"""Log-probability of an ImageNet class under DINOv2 with its linear head (Oquab et al., arXiv 2304.07193).

    reward = load_reward("dinov2")                     # from the hub: facebook/dinov2-large-imagenet1k-1-layer
    reward = load_reward("dinov2:/models/dinov2")      # a Dinov2ForImageClassification of transformers

It is what DMDR rewards class-conditional students with (arXiv 2511.13649); that its picture is resized to 256 and
cropped to 224, as DINOv2's own processor does, is inferred. The backbone saw far more than ImageNet, so a held-out
judge with another backbone is worth having beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import Dinov2ForImageClassification

from distill.parallel.device import moved
from distill.rewards.base import check_counts
from distill.rewards.clip import read_processor
from distill.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, Prepare
from distill.rewards.weights import WeightsError, find_folder, weights_digest

SOURCE = "facebook/dinov2-large-imagenet1k-1-layer"


class Dinov2Reward:
    """log p(label | picture), in natural logarithms."""

    range = (-20.0, 0.0)
    requires_grad = True

    def __init__(self, classifier: Any, prepare: Prepare, *, digest: str = "") -> None:
        """classifier: Dinov2ForImageClassification."""
        self.classifier = classifier.eval().requires_grad_(False)
        self.prepare, self.name, self.digest = prepare, "dinov2", digest

    def to(self, device: str | torch.device) -> Dinov2Reward:
        self.classifier.to(device)
        return self

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[int]) -> Tensor:
        check_counts(images, conditions, "label")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[int]) -> Tensor:
        count = int(self.classifier.config.num_labels)
        if conditions and not 0 <= min(conditions) <= max(conditions) < count:
            raise ValueError(f"labels run from {min(conditions)} to {max(conditions)}; use 0 to {count - 1}")
        labels = moved(torch.as_tensor(list(conditions), dtype=torch.int64), pixels.device)
        logits = self.classifier(pixel_values=self.prepare(pixels)).logits.float()
        return log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]


def load_dinov2(source: str | Path = SOURCE) -> Dinov2Reward:
    """A folder or hub id of a Dinov2ForImageClassification. Raises WeightsError."""
    folder = find_folder(source, "dinov2")
    try:
        classifier = Dinov2ForImageClassification.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"dinov2: {folder} does not load as a classifier ({first}); give another folder") from None
    prepare = read_processor(folder, 224, 256, IMAGENET_MEAN, IMAGENET_STD)
    return Dinov2Reward(classifier, prepare, digest=weights_digest(folder))
