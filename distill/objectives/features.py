"""Frozen networks as measures of pictures: LPIPS without its learned weights, on any tower that a folder holds.

look = load_perception("models/scenes-clip")
look.distance(pictures, others)        # (B, 3, H, W) float32 in [−1, 1], twice -> (B,)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from distill.parallel.device import device
from distill.rewards import DigitClassifier, load_reward


class Perception:
    """Feature maps of a frozen CLIP image tower, or of the convolutions of a digit classifier.

    Pictures of another size are brought to the network's, bilinearly and without aliases.
    """

    def __init__(self, network: Any) -> None:
        self.network: Any = network.eval().requires_grad_(False).to(device())
        digits = isinstance(network, DigitClassifier)
        self.size = 8 if digits else int(network.config.vision_config.image_size)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """One (B, C, places) float32 per depth, from the first on; the network's gradient reaches the pixels."""
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        if isinstance(self.network, DigitClassifier):
            found, x = list[Tensor](), pixels[:, :1].float()
            for layer in self.network.body:
                if isinstance(layer, nn.Flatten):
                    break
                x = layer(x)
                if isinstance(layer, nn.GELU):
                    found.append(x.flatten(2))
            return found
        states = self.network.vision_model(pixel_values=pixels.float(), output_hidden_states=True).hidden_states
        return [state.transpose(1, 2) for state in states[1:]]

    def distance(self, pixels: Tensor, others: Tensor) -> Tensor:
        """mean_l mean_places ‖φ_l(x) − φ_l(y)‖², each φ of unit length over its channels; (B,), at most 4.

        That is LPIPS (Zhang et al., arXiv 1801.03924, Eq. 1) with weights of one, the paper's own baseline without
        human judgements, and the mean over depths in the place of the sum.
        """
        pairs = zip(self.maps(pixels), self.maps(others), strict=True)
        depths = [(normalize(a, dim=1) - normalize(b, dim=1)).pow(2).sum(1).mean(1) for a, b in pairs]
        total: Tensor = sum(depths[1:], start=depths[0])
        return total / len(depths)


def load_perception(folder: str | Path) -> Perception:
    """The frozen network in a folder. Raises ValueError for a folder that holds none."""
    found = load_reward(folder)
    return Perception(found if isinstance(found, DigitClassifier) else found.clip)
