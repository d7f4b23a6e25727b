"""The autoencoder of the embedded video model: diffusers' AutoencoderKLWan on rendered clips.

python -m distill.run recipes/scenes-video-vae.yaml
python -m distill.run recipes/scenes-video-decoder.yaml      # then its decoder alone, while others use the latents
"""

from __future__ import annotations

import math
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor, nn

from distill.config import VideoVaeRecipe
from distill.data.cache import HELD_OUT_SEED, scene_clips
from distill.parallel.device import device, moved, normal
from distill.tasks.common import autocast, batch_indices, save_half, to_float, to_uint8
from distill.tasks.vae import detail_weight, finite_difference
from distill.tasks.video import stills
from distill.trainer import Phase, Telemetry, generator, seeded

HELD_OUT = 64
"""Clips on which reconstruction is measured."""
FIRST_DEVIATION = 0.05
"""Of the latents' posterior before training."""


def new_video_vae(recipe: VideoVaeRecipe) -> Any:
    """A fresh AutoencoderKLWan: 4 × in time, and 2 × in space per level of dim_mult but the last.

    Its posterior starts at FIRST_DEVIATION: at torch's own start, 1, noise as large as the latents hides colours for
    thousands of iterations.
    """
    model, levels = recipe.model, len(recipe.model.dim_mult)
    channels = model.latent_channels
    vae: Any = AutoencoderKLWan(
        base_dim=model.base_dim,
        z_dim=channels,
        dim_mult=list(model.dim_mult),
        num_res_blocks=model.res_blocks,
        temperal_downsample=[i >= levels - 3 for i in range(levels - 1)],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=2 ** (levels - 1),
    )
    with torch.no_grad():
        vae.quant_conv.weight[channels:].zero_()
        vae.quant_conv.bias[channels:].fill_(2 * math.log(FIRST_DEVIATION))
    return vae


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    power = (x * x).sum(1, keepdim=True, dtype=torch.float32)
    inverse: Tensor = (self.scale * torch.rsqrt(power + 1e-12)).to(x.dtype)
    normed: Tensor = x * inverse * self.gamma.to(x.dtype)
    return normed


def with_fused_norms(vae: Any) -> Any:
    """The same autoencoder, whose norms over channels are x·√C/‖x‖·γ in two passes over x instead of seven.

    diffusers normalises in float32 by way of a division: on a CPU a third of a training step in bfloat16.
    """
    for module in vae.modules():
        if isinstance(module, WanRMS_norm) and module.channel_first:
            module.forward = MethodType(_rms_norm, module)  # type: ignore[method-assign]
    return vae


def frames_of(videos: Tensor) -> Tensor:
    """Videos (B, 3, F, H, W) as pictures (B·F, 3, H, W)."""
    return videos.transpose(1, 2).flatten(0, 1)


class VideoVaeTask:
    """Reconstruction: L1 on pixels and differences in space and time, weighted towards detail; and a small KL term."""

    def __init__(self, recipe: VideoVaeRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        start: Any = AutoencoderKLWan.from_pretrained(recipe.decoder_of) if recipe.decoder_of else new_video_vae(recipe)
        self.vae = with_fused_norms(start)
        self.vae.train().to(device())
        if recipe.decoder_of:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.roles: dict[str, nn.Module] = {"vae": self.vae}
        self.optimizers = {"vae": recipe.optimizer}
        data = recipe.data
        assert data.frames is not None
        self.clips = scene_clips(data.seed, data.count, data.frames, data.size)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("vae", lambda micro: self._loss(iteration, micro))]

    def _draw(self, iteration: int, micro: int) -> Tensor:
        """A micro-batch of windows of clips, each from a frame and, but for whole frames, a place of its own on.

        Returns (b, 3, window, H, W) or (b, 3, window, crop, crop); the first iterations' windows are single frames of
        ``window`` times as many clips.
        """
        r = self.recipe
        size, window, rng = r.batch_size // r.accumulate, r.window, seeded(r.seed, iteration, micro, "window")
        if iteration < r.single_frames:
            size, window = size * window, 1
        index = batch_indices(r.seed, iteration, micro, size, r.data.count)
        frames, height, width = self.clips.shape[2:]
        side = height if r.crop is None or rng.random() < r.p_whole else r.crop
        corners = rng.integers(0, (frames - window + 1, height - side + 1, width - side + 1), (size, 3))
        windows = [
            self.clips[i, :, t : t + window, y : y + side, x : x + side]
            for i, (t, y, x) in zip(index, corners, strict=True)
        ]
        return moved(to_float(np.stack(windows)), device())

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        x = self._draw(iteration, micro)
        with autocast(r.precision):
            with torch.set_grad_enabled(r.decoder_of is None):
                posterior = self.vae.encode(x).latent_dist
            std = torch.exp(0.5 * posterior.logvar.float())
            z = posterior.mean.float()
            if not r.decoder_of:  # what a decoder will be given later has no such noise
                z = z + std * normal(std.shape, generator(r.seed, iteration, micro, "noise"), std.device)
            y = self.vae.decode(z).sample
        error = x - y.float()
        weight = detail_weight(frames_of(x), r.detail_weight)
        pixels = (weight * frames_of(error).abs()).mean()
        edges = (weight * finite_difference(frames_of(error))).mean()
        changes = torch.diff(error, dim=2).abs().sum() / error.numel()
        kl = 0.5 * (posterior.mean.float() ** 2 + std**2 - 1 - posterior.logvar.float()).flatten(1).sum(1).mean()
        loss = pixels + r.gradient_weight * (edges + changes) + r.kl_weight * kl
        return loss, {"l1": error.detach().abs().mean(), "kl": kl.detach()}

    @torch.no_grad()
    def _held_out(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clips that no training uses, their latents and reconstructions."""
        data = self.recipe.data
        assert data.frames is not None
        x = to_float(scene_clips(HELD_OUT_SEED, HELD_OUT, data.frames, data.size)[:count]).to(device())
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in x.split(4)])
        return x, latents, torch.cat([self.vae.decode(part).sample for part in latents.split(4)])

    def preview(self) -> Tensor:
        x, _, y = self._held_out(8)
        return stills(to_uint8(torch.cat((x, y))))

    def finish(self, output: Path) -> None:
        """Save the VAE with the mean and deviation of its latents per channel, and print its held-out PSNR.

        Where the decoder alone was trained they stay what they were: networks have been trained on them.
        """
        x, latents, y = self._held_out(HELD_OUT)
        error = (x - y.clamp(-1, 1)).pow(2).flatten(1).mean(1)
        print(f"held-out PSNR {float((10 * torch.log10(4 / error)).mean()):.2f} dB over {len(x)} clips")
        if not self.recipe.decoder_of:
            rows = latents.transpose(0, 1).flatten(1)
            statistics = {"latents_mean": rows.mean(1), "latents_std": rows.std(1)}
            rounded = {name: [round(float(v), 5) for v in values] for name, values in statistics.items()}
            self.vae.register_to_config(**rounded)
        save_half(self.vae, output)
