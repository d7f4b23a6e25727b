"""What Stable Diffusion's families share: a UNet on the latents of an AutoencoderKL, read by words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from distill.families.parts import Parts, check_size, decoded, scene_preview


class StableDiffusion(Parts):
    """Latents, plans for sharding and adapters, and what a bundle says of the architecture."""

    name: str
    vae: Any
    tokenizer: Any
    prediction: str
    stride: int
    size: tuple[int, int]

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        width, height = size or self.size
        check_size((width, height), self.stride, "this autoencoder")
        return (self.vae.config.latent_channels, height // self.stride, width // self.stride)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] to latents in model scale: the posterior's mean times the scaling factor."""
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.vae, latents / self.vae.config.scaling_factor)

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (BasicTransformerBlock, ResnetBlock2D)

    def lora_targets(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "task": "text-to-image",
            "prediction": self.prediction,
            "latent_channels": int(self.vae.config.latent_channels),
            "latent_stride": self.stride,
            "sizes": (self.size,),
            "max_tokens": int(self.tokenizer.model_max_length),
            "preview": scene_preview(self),
        }
