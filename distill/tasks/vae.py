"""The autoencoder of the embedded image models: diffusers' AutoencoderKL on rendered scenes.

python -m distill.run recipes/scenes-vae.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from distill.config import VaeRecipe
from distill.data.cache import HELD_OUT_SEED, scene_images
from distill.parallel.device import device, moved, normal
from distill.tasks.common import autocast, batch_indices, save_half, to_float, to_uint8
from distill.trainer import Phase, Telemetry, generator


def finite_difference(x: Tensor) -> Tensor:
    """|∂x| + |∂y| of pictures (B, C, H, W), same shape; differences past the border are zero."""
    return pad(torch.diff(x, dim=3), (0, 1)).abs() + pad(torch.diff(x, dim=2), (0, 0, 0, 1)).abs()


def detail_weight(x: Tensor, strength: float) -> Tensor:
    """1 + λ·(local deviation), (B, 1, H, W): things and their edges count more than the empty ground, which is most."""
    local = avg_pool2d(pad(x, (4, 4, 4, 4), mode="replicate"), 9, 1)
    deviation = (x - local).abs().amax(1, keepdim=True)
    return 1 + strength * max_pool2d(deviation, 5, 1, 2)


def new_vae(recipe: VaeRecipe) -> Any:
    """A fresh AutoencoderKL of the recipe's sizes."""
    model, blocks = recipe.model, len(recipe.model.block_out_channels)
    return AutoencoderKL(
        block_out_channels=model.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=model.layers_per_block,
        latent_channels=model.latent_channels,
        norm_num_groups=model.norm_num_groups,
        sample_size=recipe.data.size,
    )


class VaeTask:
    """Reconstruction (L1 on pixels and on finite differences, weighted towards detail) plus a small KL term."""

    def __init__(self, recipe: VaeRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.vae = new_vae(recipe)
        self.vae.train().to(device())
        self.roles: dict[str, nn.Module] = {"vae": self.vae}
        self.optimizers = {"vae": recipe.optimizer}
        self.images = scene_images(recipe.data.seed, recipe.data.count, recipe.data.size)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("vae", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count)
        x = moved(to_float(self.images[np.sort(index)]), device())
        with autocast(r.precision):
            posterior = self.vae.encode(x).latent_dist
            std = torch.exp(0.5 * posterior.logvar.float())
            noise = normal(std.shape, generator(r.seed, iteration, micro, "noise"), std.device)
            y = self.vae.decode(posterior.mean.float() + std * noise).sample
        y = y.float()
        weight = detail_weight(x, r.detail_weight)
        pixels = (weight * (x - y).abs()).mean()
        edges = (weight * finite_difference(x - y)).mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + std**2 - 1 - posterior.logvar.float()).sum((1, 2, 3)).mean()
        loss = pixels + r.gradient_weight * edges + r.kl_weight * kl
        return loss, {"l1": pixels.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def _reconstruct(self, count: int) -> tuple[Tensor, Tensor]:
        x = to_float(scene_images(HELD_OUT_SEED, 256, self.recipe.data.size)[:count]).to(device())
        y = torch.cat([self.vae.decode(self.vae.encode(part).latent_dist.mode()).sample for part in x.split(32)])
        return x, y

    def preview(self) -> Tensor:
        x, y = self._reconstruct(16)
        return to_uint8(torch.cat((x[:8], y[:8], x[8:], y[8:])))

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        """Save the VAE with the factor that scales its latents to unit variance, and print its held-out PSNR."""
        x, y = self._reconstruct(256)
        error = (x - y.clamp(-1, 1)).pow(2).mean((1, 2, 3))
        print(f"held-out PSNR {float((10 * torch.log10(4 / error)).mean()):.2f} dB over {len(x)} scenes")
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in x.split(32)])
        self.vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
        save_half(self.vae, output)
