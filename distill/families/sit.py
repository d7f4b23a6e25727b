"""SiT's family: a class-conditional DiT (diffusers' DiTTransformer2DModel) in pixel space, flow matching.

x_t = (1 − t)·x0 + t·ε, the network predicts ε − x0 and reads 1000·t; label 10 is the unconditional input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from distill.config import SitModel
from distill.families.base import Condition, Prediction, coefficients, preview_matrix
from distill.families.taps import tapped
from distill.math import convert
from distill.sampling import Flow
from distill.tasks.common import save_half

CLASSES = 10
TIME_SCALE = 1000.0


class Sit:
    """Pixel space: latents are pictures of 8 × 8 × 1 in [−1, 1]; conditions are labels."""

    name, prediction = "sit", "flow"

    def __init__(self, model: SitModel | None = None) -> None:
        self.schedule, self._model, self.size = Flow(), model, 8

    @classmethod
    def from_folder(cls, folder: str | Path) -> tuple[Sit, Any]:
        network = DiTTransformer2DModel.from_pretrained(Path(folder) / "transformer", torch_dtype=torch.float32)
        return cls(), _prepare(network)

    def new_network(self) -> Any:
        if self._model is None:
            raise ValueError("this family was loaded from a folder, which has its network; recipes name a fresh one")
        m = self._model
        network = DiTTransformer2DModel(
            sample_size=self.size,
            in_channels=1,
            out_channels=1,
            patch_size=m.patch,
            num_layers=m.layers,
            num_attention_heads=m.heads,
            attention_head_dim=m.width // m.heads,
            num_embeds_ada_norm=CLASSES,
            norm_num_groups=1,
        )
        return _prepare(network)

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """Taps: ``mid`` is the middle block's tokens as a map, (B, width, h', w')."""
        blocks = network.transformer_blocks if taps else ()
        with tapped({"mid": blocks[len(blocks) // 2]} if taps else {}, taps) as tokens:
            output = network(x_t, timestep=TIME_SCALE * t.float(), class_labels=condition["labels"], return_dict=False)[
                0
            ]
        side = x_t.shape[-1] // network.config.patch_size if taps else 0
        features = {name: f.transpose(1, 2).unflatten(2, (-1, side)) for name, f in tokens.items()}
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert(self.prediction, x_t, output, alpha, sigma), features=features)

    def encode(self, prompts: Sequence[int]) -> Condition:
        labels = torch.as_tensor(list(prompts), dtype=torch.int64)
        if len(labels) and (labels.min() < 0 or labels.max() >= CLASSES):
            raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}; use 0 to {CLASSES - 1}")
        return {"labels": labels}

    def unconditional(self, n: int) -> Condition:
        return {"labels": torch.full((n,), CLASSES, dtype=torch.int64)}

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        if size not in (None, (self.size, self.size)):
            raise ValueError(f"size is {size}; digits are {self.size} × {self.size}")
        return (1, self.size, self.size)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (BasicTransformerBlock,)

    def lora_targets(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def save(self, network: nn.Module, folder: Path) -> None:
        save_half(network, folder / "transformer")

    def describe(self) -> dict[str, Any]:
        identity = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        return {
            "family": self.name,
            "task": "class-to-image",
            "prediction": self.prediction,
            "latent_channels": 1,
            "latent_stride": 1,
            "sizes": ((self.size, self.size),),
            "preview": preview_matrix(identity, identity.expand(-1, 3, -1, -1)),
        }


def _prepare(network: Any) -> Any:
    """Explicit attention (see the sdxl family), and no label dropout of the network's own: tasks drop conditions."""
    for module in network.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return network
