"""What MMDiT families share: flow matching on an AutoencoderKL of 16 channels, read by CLIP and T5 side by side.

x_t = (1 − t)·x0 + t·ε, the network predicts ε − x0. Traps kept in one place:

* These autoencoders have a mean as well: latents in model scale are (z − shift_factor)·scaling_factor.
* T5 leaves float16's range: its weights are taken as they are stored (bfloat16), or float32 in the place of float16.
* T5's rows beyond a prompt are its own output for padding and no zeros (Wan's are): the networks were trained so.
* Without a prompt they take the embedding of "", whose T5 rows are not zero either.
* A block gives the states of the text first and those of the picture second.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import T5EncoderModel

from distill.families.base import Condition
from distill.families.parts import Parts, Remembered, check_size, decoded, scene_preview, without_float16
from distill.families.schedulers import flow
from distill.parallel.device import moved
from distill.sampling import Flow
from distill.tasks.common import freeze, save_half

log = logging.getLogger(__name__)

PATCH = 2
"""Latents per token along height and width, in both families."""


class Mmdit(Parts):
    """Latents, text of T5, and what a bundle says of the architecture."""

    name: str
    prediction = "flow"
    max_tokens: int
    """Of T5."""
    vae: Any
    schedule: Flow

    def __init__(self, vae: Any, encoders: dict[str, Any], *, schedule: Flow, size: tuple[int, int]) -> None:
        """vae: AutoencoderKL; encoders: frozen text encoders by the name of their folder, None where there is none."""
        self.vae = freeze(vae)
        for name, encoder in encoders.items():
            setattr(self, name, None if encoder is None else freeze(encoder))
        self.part_names = ("vae", *encoders)
        self.schedule, self.size, self.stride = schedule, size, 2 ** (len(vae.config.block_out_channels) - 1)
        self._empty = Remembered()

    def new_network(self) -> Any:
        raise ValueError(f"the {self.name} family is loaded from a folder, which has its network; give the teacher's")

    def encode(self, prompts: Sequence[str]) -> Condition:
        raise NotImplementedError

    def unconditional(self, n: int) -> Condition:
        return self._empty.rows(self, "", n)

    def _t5_states(self, encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """T5's last hidden states, (B, max_tokens, D) float32, of the padding too."""
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        with without_float16(self.device):
            return encoder(moved(ids, self.device)).last_hidden_state.float()  # type: ignore[no-any-return]

    def _clip_ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        ids: Tensor = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return moved(ids, self.device)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        width, height = size or self.size
        check_size((width, height), PATCH * self.stride, f"{self.name}, which cuts latents into patches of 2 × 2,")
        return (self.vae.config.latent_channels, height // self.stride, width // self.stride)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] to latents in model scale: (posterior mean − shift)·scale."""
        config = self.vae.config
        z = self.vae.encode(images).latent_dist.mode()
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return decoded(self.vae, latents / config.scaling_factor + (config.shift_factor or 0.0))

    def lora_targets(self) -> tuple[str, ...]:
        """Both streams' attention and feed-forward layers, as diffusers' training scripts for these models have it."""
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        return (*attention, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def _save(self, kind: Any, network: Any, folder: Path, tokenizers: dict[str, Any], **others: Any) -> None:
        """The folder of a diffusers pipeline whose scheduler draws fresh noise between steps.

        The shift is the schedule's own number: a student has learned the times of one size.
        """
        save_half(network, folder / "transformer")
        for name, part in self.parts.items():
            _save_part(part, folder / name)
        for name, tokenizer in tokenizers.items():
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=self.schedule.shift, stochastic_sampling=True)
        scheduler.save_pretrained(folder / "scheduler")
        parts = {name: getattr(self, name) for name in self.part_names}
        pipeline: Any = kind(**parts, **tokenizers, transformer=network, scheduler=scheduler, **others)
        pipeline.save_config(folder)

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "task": "text-to-image",
            "prediction": self.prediction,
            "latent_channels": int(self.vae.config.latent_channels),
            "latent_stride": self.stride,
            "sizes": (self.size,),
            "max_tokens": self.max_tokens,
            "preview": scene_preview(self),
        }


def _save_part(part: Any, folder: Path) -> None:
    """In bfloat16 where that holds every weight, else in float16; its config names float32, as pipelines mix none."""
    if not all(torch.equal(p.to(torch.bfloat16).to(p.dtype), p) for p in part.parameters()):
        save_half(part, folder)
        return
    copy.deepcopy(part).to(torch.bfloat16).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def t5_from_folder(folder: Path) -> Any:
    """T5EncoderModel with its weights as they are stored, float16 as float32."""
    encoder: Any = T5EncoderModel.from_pretrained(folder, dtype="auto")
    return encoder.float() if encoder.dtype is torch.float16 else encoder


def schedule_for(config: dict[str, Any], where: str, vae: Any, size: tuple[int, int], shift: float | None) -> Flow:
    """The flow of a scheduler's config at a size, whose number of tokens decides where the shift is dynamic."""
    per_token = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
    return flow(config, where, shift, tokens=(size[0] // per_token) * (size[1] // per_token))
