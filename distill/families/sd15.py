"""Stable Diffusion 1.5's family: UNet2DConditionModel on AutoencoderKL latents, one CLIP text encoder, 1000 timesteps.

Traps kept in one place: the text is the last hidden state after the final layer norm (SDXL takes the penultimate one
before it); the unconditional input is the embedding of "", not zeros; latents are scaled by 0.18215. Timestep 999 is
not pure noise (√ᾱ = 0.068), as in SDXL.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill.export.folder import save_pipeline
from distill.families.base import Condition, Prediction, coefficients
from distill.families.parts import Remembered, explicit_attention
from distill.families.schedulers import PREDICTION_TYPES, discrete, read_config
from distill.families.stable_diffusion import StableDiffusion
from distill.families.taps import tapped
from distill.math import convert
from distill.parallel.device import moved
from distill.sampling import ScaledLinear
from distill.tasks.common import freeze


class Sd15(StableDiffusion):
    """The parts that all roles share: autoencoder, text encoder, tokenizer and the schedule."""

    name = "sd15"
    part_names = ("vae", "text_encoder")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        *,
        prediction: str = "epsilon",
        schedule: ScaledLinear | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """vae: AutoencoderKL; text_encoder: CLIPTextModel; size: (width, height) in pixels, None: the autoencoder's."""
        self.vae: Any = freeze(vae)
        self.text_encoder: Any = freeze(text_encoder)
        self.tokenizer = tokenizer
        self.prediction, self.schedule = prediction, schedule or ScaledLinear()
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = size or (int(vae.config.sample_size),) * 2
        self._empty = Remembered()

    @classmethod
    def from_folder(cls, folder: str | Path, *, size: tuple[int, int] | None = None) -> tuple[Sd15, Any]:
        """From a diffusers folder: the family and the network in it, all in float32."""
        root = Path(folder)
        prediction, schedule = discrete(read_config(root / "scheduler" / "scheduler_config.json"), str(root))
        family = cls(
            AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32),
            CLIPTextModel.from_pretrained(root / "text_encoder", attn_implementation="eager", dtype=torch.float32),
            CLIPTokenizer.from_pretrained(root / "tokenizer"),
            prediction=prediction,
            schedule=schedule,
            size=size,
        )
        return family, explicit_attention(
            UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32)
        )

    @classmethod
    def from_config(cls, configs: Mapping[str, Any], *, size: tuple[int, int] | None = None) -> tuple[Sd15, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        prediction, schedule = discrete(configs["scheduler"], "the scheduler's config")
        family = cls(
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            None,
            prediction=prediction,
            schedule=schedule,
            size=size,
        )
        return family, UNet2DConditionModel.from_config(configs["unet"])

    def new_network(self) -> Any:
        raise ValueError("the sd15 family is loaded from a folder, which has its network; give the teacher's folder")

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """Taps: ``mid`` is the output of the middle block, (B, C, h', w')."""
        with tapped({"mid": network.mid_block} if taps else {}, taps) as features:
            output = network(**self.inputs(x_t, t, condition), return_dict=False)[0]
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert(self.prediction, x_t, output, alpha, sigma), features=features)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's forward takes, by name."""
        return {"sample": x_t, "timestep": t, "encoder_hidden_states": condition["prompt_embeds"]}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The text encoder's last hidden states: prompt_embeds (B, L, D)."""
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"prompt_embeds": self.text_encoder(input_ids=moved(ids, self.device)).last_hidden_state}

    def unconditional(self, n: int) -> Condition:
        return self._empty.rows(self, "", n)

    def blank(self, n: int) -> Condition:
        """Zeros of a condition's shape."""
        config = self.text_encoder.config
        shape = (n, config.max_position_embeddings, config.hidden_size)
        return {"prompt_embeds": torch.zeros(shape, device=self.device)}

    def save(self, network: nn.Module, folder: Path) -> None:
        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(self.vae),
            text_encoder=copy.deepcopy(self.text_encoder),
            tokenizer=self.tokenizer,
            unet=copy.deepcopy(network),
            scheduler=LCMScheduler(
                beta_start=self.schedule.beta_start,
                beta_end=self.schedule.beta_end,
                beta_schedule="linear" if self.schedule.linear else "scaled_linear",
                num_train_timesteps=self.schedule.num_timesteps,
                original_inference_steps=self.schedule.num_timesteps,
                prediction_type=PREDICTION_TYPES[self.prediction],
                rescale_betas_zero_snr=self.schedule.zero_terminal,
                steps_offset=1,  # what the pipeline asks of a config; this scheduler's times do not depend on it
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        save_pipeline(pipeline, folder)
