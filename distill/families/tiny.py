"""A small decoder in the place of an autoencoder's own, for pictures that are only judged: TAESD and its kin.

decode = tiny_decoder("madebyollin/taesdxl", family)      # or a folder; diffusers' AutoencoderTiny
pictures = decode(latents)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny
from torch import Tensor

from distill.config import RecipeError
from distill.hub import is_hub_id, snapshot
from distill.parallel.device import device
from distill.tasks.common import freeze

FILES = ("config.json", "*.safetensors")


def tiny_decoder(source: str, family: Any) -> Callable[[Tensor], Tensor]:
    """What makes pictures (B, 3, H, W) float in about [−1, 1] of a family's normalised latents (B, C, h, w), roughly.

    Raises RecipeError where the folder holds none, or one of other latents.
    """
    there = Path(source).is_dir() or not is_hub_id(source)
    folder = Path(source) if there else snapshot(source, "advantage.decoder", FILES)
    try:
        vae: Any = AutoencoderTiny.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(f"advantage.decoder: {source} holds no AutoencoderTiny ({error})") from None
    channels, stride = vae.config.latent_channels, 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    shape = family.latent_shape()
    if (len(shape), shape[0], family.stride) != (3, channels, stride):
        raise RecipeError(
            f"advantage.decoder: {source} decodes pictures of {channels} channels at stride {stride}, and latents of "
            f"{family.name} are {shape} at stride {family.stride}; give one of the same, or leave it out"
        )
    freeze(vae).to(device())
    return lambda latents: vae.decode(latents, return_dict=False)[0]
