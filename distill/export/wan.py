"""The graphs of a Wan student: UMT5, one step of the transformer, and the causal decoder, whole and continued.

    text_encoder  input_ids, attention_mask (B, L) int64 -> prompt_embeds (B, L, D), zero beyond the prompt
    step          as of pictures, with latents (B, C, f, h, w)
    decoder       latents (B, C, f, h, w) in model scale -> image (B, 4·f − 3, H, W, 3) uint8, kept_0, kept_1, …
    decoder_next  latents (B, C, f, h, w), past_0, past_1, … -> image (B, 4·f, H, W, 3) uint8, kept_0, kept_1, …

f, the number of latent frames, is free. A clip is decoded at once by ``decoder``, or piece by piece: ``decoder`` takes
the first latent frames, ``decoder_next`` any number of the following ones with what the call before it kept, two frames
of every causal convolution's input. Both ways, and any cut, give what diffusers' ``AutoencoderKLWan.decode`` gives.

diffusers decodes latent frames one by one in a Python loop, which an exporter unrolls for one number of frames. The
rewrite here runs each layer over all frames:

* a causal convolution pads two frames of zeros on the left, or takes the two kept ones;
* a temporal upsampling leaves the clip's first frame alone and makes two frames of each other one. diffusers does not
  show that first frame to the convolution in time at all, which is the same as showing zeros in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.bundle import BundleError, Manifest
from distill.export.graphs import (
    GraphSpec,
    Inputs,
    affine_step,
    guided,
    latent_dims,
    latent_sizes,
    step_graph,
    to_uint8,
)
from distill.families.wan import TIME_SCALE, Wan

KEPT = 2
"""Frames before the current one that a causal convolution of three frames sees."""


class WanTextEncoder(nn.Module):
    """UMT5's last hidden states, zero beyond each prompt's end, as Wan was trained: (B, L) int64 twice -> (B, L, D)."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(input_ids, attention_mask).last_hidden_state
        return states * attention_mask[..., None]


class WanStep(nn.Module):
    """One sampler step of a WanTransformer3DModel that predicts the flow ε − x0 at time t in [0, 1].

    unconditional: (1, L, D), what the other half of a doubled batch reads where guidance_scale is not 1.
    """

    unconditional: Tensor

    def __init__(
        self, transformer: nn.Module, guidance_scale: float = 1.0, unconditional: Tensor | None = None
    ) -> None:
        super().__init__()
        self.transformer, self.guidance_scale = transformer, guidance_scale
        if guidance_scale != 1.0:
            if unconditional is None:
                raise ValueError(f"guidance_scale is {guidance_scale}; give the unconditional embedding, or scale 1")
            self.register_buffer("unconditional", unconditional)

    def forward(
        self, latents: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor, prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, t = latents, timestep * TIME_SCALE
        if self.guidance_scale != 1.0:
            x, t = torch.cat((x, x)), torch.cat((t, t))
            blank = self.unconditional.expand(prompt_embeds.shape[0], -1, -1)
            prompt_embeds = torch.cat((prompt_embeds, blank))
        output = self.transformer(x, t, prompt_embeds, return_dict=False)[0]
        if self.guidance_scale != 1.0:
            output = guided(output, self.guidance_scale)
        return affine_step(latents, output, coefficients, noise)


class WanDecoder(nn.Module):
    """Normalised latents of the first frames of a clip to frames, and what the following ones need.

    latents: (B, C, f, h, w) in model scale. Returns image (B, 4·f − 3, H, W, 3) uint8 and the last two frames of the
    input of every causal convolution, float32.
    """

    first = True
    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        config: Any = vae.config
        if config.get("is_residual") or (config.get("patch_size") or 1) != 1:
            raise BundleError("the autoencoder is Wan2.2's; the export knows Wan2.1's, so use its vae folder")
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        for name, row in (("mean", config.latents_mean), ("deviation", config.latents_std)):
            self.register_buffer(name, torch.tensor(row, dtype=torch.float32).reshape(1, -1, 1, 1, 1))

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self._decode(latents, Memory(()))

    def _decode(self, latents: Tensor, kept: Memory) -> tuple[Tensor, ...]:
        layers = self.decoder
        x = self.post_quant_conv(latents * self.deviation + self.mean)
        x = self._causal(layers.conv_in, x, kept)
        middle = layers.mid_block
        x = self._residual(middle.resnets[0], x, kept)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = self._residual(resnet, x if attention is None else attention(x), kept)
        for block in layers.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x, kept)
            if block.upsamplers is not None:
                x = self._upsample(block.upsamplers[0], x, kept)
        x = self._causal(layers.conv_out, layers.nonlinearity(layers.norm_out(x)), kept)
        return to_uint8(x), *kept.new

    def _causal(self, convolution: Any, x: Tensor, kept: Memory) -> Tensor:
        if self.first:
            kept.keep(F.pad(x, (0, 0, 0, 0, KEPT, 0)))
            return convolution(x)  # type: ignore[no-any-return]
        past = kept.take()
        kept.keep(torch.cat((past, x), dim=2))
        return convolution(x, past)  # type: ignore[no-any-return]

    def _residual(self, block: Any, x: Tensor, kept: Memory) -> Tensor:
        shortcut: Tensor = block.conv_shortcut(x)
        x = self._causal(block.conv1, block.nonlinearity(block.norm1(x)), kept)
        return shortcut + self._causal(block.conv2, block.nonlinearity(block.norm2(x)), kept)

    def _upsample(self, layer: Any, x: Tensor, kept: Memory) -> Tensor:
        """Twice as wide and high, and in the mode upsample3d twice as many frames, but for the clip's first."""
        if layer.mode == "upsample3d":
            seen = torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, 1:]), dim=2) if self.first else x
            pairs = self._causal(layer.time_conv, seen, kept).unflatten(1, (2, layer.dim))
            doubled = torch.stack((pairs[:, 0], pairs[:, 1]), dim=3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], doubled[:, :, 2:]), dim=2) if self.first else doubled
        frames = x.shape[2]
        pictures = layer.resample(x.transpose(1, 2).flatten(0, 1))
        return pictures.unflatten(0, (-1, frames)).transpose(1, 2)  # type: ignore[no-any-return]


class WanNextDecoder(WanDecoder):
    """The following frames of a clip: latents (B, C, f, h, w) and what was kept -> (B, 4·f, H, W, 3) uint8, kept."""

    first = False

    def forward(self, latents: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return self._decode(latents, Memory(past))


class Memory:
    """Frames that causal convolutions kept, in the order of the layers, and those that they keep now."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self._past = iter(past)
        self.new: list[Tensor] = []

    def take(self) -> Tensor:
        return next(self._past)

    def keep(self, seen: Tensor) -> None:
        self.new.append(seen[:, :, -KEPT:])


class WholeDecoder(nn.Module):
    """diffusers' own way from normalised latents to frames; what the rewrite is held against."""

    def __init__(self, family: Wan) -> None:
        super().__init__()
        self.family = family

    def forward(self, latents: Tensor) -> Tensor:
        return to_uint8(self.family.decode(latents))


@torch.no_grad()
def wan_graphs(bundle_dir: Path, manifest: Manifest) -> list[GraphSpec]:
    """The four graphs of a bundle, in the order in which a clip passes them."""
    if not manifest.frames or manifest.max_tokens is None:
        raise BundleError(
            f"{bundle_dir} has frames {manifest.frames} and max_tokens {manifest.max_tokens}; a bundle of videos names "
            "both, write it again"
        )
    family, transformer = Wan.from_folder(bundle_dir)
    family.text_encoder.float()
    text = _text_graph(WanTextEncoder(family.text_encoder), manifest)
    scale = manifest.guidance.scale
    blank = family.unconditional(1)["prompt_embeds"] if scale != 1.0 else None
    step = step_graph(
        WanStep(transformer, scale, blank),
        manifest,
        {"prompt_embeds": tuple(int(s) for s in text.dims["prompt_embeds"][1:])},
    )
    return [text, step, *_decoder_graphs(family, manifest)]


def _text_graph(module: WanTextEncoder, manifest: Manifest) -> GraphSpec:
    config: Any = module.text_encoder.config
    length, pad, end = manifest.max_tokens or 0, int(config.pad_token_id), int(config.eos_token_id)

    def draw(batch: int, generator: torch.Generator) -> Inputs:
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        words = torch.randint(1, length, (batch, 1), generator=generator)
        place = torch.arange(length)
        ids = torch.where(place < words, ids, torch.where(place == words, end, pad))
        return {"input_ids": ids, "attention_mask": (place <= words).long()}

    dims: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", length),
        "attention_mask": ("batch", length),
        "prompt_embeds": ("batch", length, int(config.d_model)),
    }
    return GraphSpec("text_encoder", module, draw, dims, ("prompt_embeds",))


def _decoder_graphs(family: Wan, manifest: Manifest) -> list[GraphSpec]:
    """The decoder of the first latent frames and the one of the following."""
    first, following = WanDecoder(family.vae), WanNextDecoder(family.vae)
    shape, sizes, channels = latent_dims(manifest), latent_sizes(manifest), manifest.latent_channels

    def latents(batch: int, generator: torch.Generator, sides: tuple[int, int]) -> Tensor:
        return torch.randn((batch, channels, batch + 1, *sides), generator=generator)

    def draw(batch: int, generator: torch.Generator, sides: tuple[int, int]) -> Inputs:
        return {"latents": latents(batch, generator, sides)}

    def draw_next(batch: int, generator: torch.Generator, sides: tuple[int, int]) -> Inputs:
        _, *past = first(latents(batch, generator, sides))
        return draw(batch, generator, sides) | {f"past_{i}": value for i, value in enumerate(past)}

    sides: list[int | str] = [
        side * manifest.latent_stride if isinstance(side, int) else f"image_{side}" for side in shape[3:]
    ]
    dims: dict[str, tuple[int | str, ...]] = {"latents": shape, "image": ("batch", "image_frames", *sides, 3)}
    example = first(*draw(1, torch.Generator().manual_seed(0), sizes[0]).values())
    memory: dict[int, tuple[int | str, ...]] = {}
    for i, value in enumerate(example[1:]):
        free = (f"{side}_{i}" if isinstance(side, str) else int(value.shape[k + 3]) for k, side in enumerate(shape[3:]))
        memory[i] = ("batch", int(value.shape[1]), KEPT, *free)
    kept = {f"kept_{i}": value for i, value in memory.items()}
    past = {f"past_{i}": value for i, value in memory.items()}
    outputs = ("image", *kept)
    whole = WholeDecoder(family)
    return [
        GraphSpec("decoder", first, draw, {**dims, **kept}, outputs, sizes, reference=whole),
        GraphSpec(
            "decoder_next",
            following,
            draw_next,
            {"latents": shape, **past, "image": dims["image"], **kept},
            outputs,
            sizes,
        ),
    ]
