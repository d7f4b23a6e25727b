"""SDXL's family: UNet2DConditionModel on AutoencoderKL latents, two CLIP text encoders, 1000 timesteps.

Traps kept in one place: the unconditional input is zeros for text and pooled text; the size conditioning is
(H, W, 0, 0, H, W); SDXL predicts ε and its timestep 999 is not pure noise (√ᾱ = 0.068), yet samplers start from
N(0, 1). Fine-tunes that predict v, with a schedule that does end in pure noise, say so in their scheduler's config.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.config import SdxlSource, UnetModel
from distill.export.folder import save_pipeline
from distill.families.base import Condition, Prediction, coefficients
from distill.families.parts import explicit_attention
from distill.families.schedulers import PREDICTION_TYPES, discrete, read_config
from distill.families.stable_diffusion import StableDiffusion
from distill.families.taps import tapped
from distill.math import convert
from distill.parallel.device import moved
from distill.sampling import ScaledLinear
from distill.tasks.common import freeze


class Sdxl(StableDiffusion):
    """The parts that all roles share: autoencoder, text encoders, tokenizers and the schedule."""

    name = "sdxl"
    part_names = ("vae", "text_encoder", "text_encoder_2")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        *,
        tokenizer_2: Any = None,
        prediction: str = "epsilon",
        schedule: ScaledLinear | None = None,
        unet: UnetModel | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """vae: AutoencoderKL; text_encoder: CLIPTextModel; text_encoder_2: CLIPTextModelWithProjection.

        tokenizer_2: the second encoder's, which in SDXL pads with another token; None: the first one's.
        size: (width, height) in pixels; None: the autoencoder's own.
        """
        self.vae: Any = freeze(vae)
        self.text_encoder: Any = freeze(text_encoder)
        self.text_encoder_2: Any = freeze(text_encoder_2)
        self.tokenizer, self.tokenizer_2, self._unet = tokenizer, tokenizer_2 or tokenizer, unet
        self.prediction, self.schedule = prediction, schedule or ScaledLinear()
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = size or (int(vae.config.sample_size),) * 2

    @classmethod
    def from_source(cls, source: SdxlSource) -> Sdxl:
        """From its parts in separate folders; ``new_network`` makes a fresh UNet."""
        return cls(
            AutoencoderKL.from_pretrained(source.vae, torch_dtype=torch.float32),
            CLIPTextModel.from_pretrained(source.text_encoder, attn_implementation="eager", dtype=torch.float32),
            CLIPTextModelWithProjection.from_pretrained(
                source.text_encoder_2, attn_implementation="eager", dtype=torch.float32
            ),
            CLIPTokenizer.from_pretrained(Path(source.text_encoder_2).parent / "tokenizer"),
            prediction=source.prediction,
            schedule=ScaledLinear(zero_terminal=source.zero_terminal_snr),
            unet=source.unet,
        )

    @classmethod
    def from_folder(cls, folder: str | Path, *, size: tuple[int, int] | None = None) -> tuple[Sdxl, Any]:
        """From a diffusers folder: the family and the network in it, all in float32."""
        root = Path(folder)
        prediction, schedule = discrete(read_config(root / "scheduler" / "scheduler_config.json"), str(root))
        second = root / "tokenizer_2"
        family = cls(
            AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32),
            CLIPTextModel.from_pretrained(root / "text_encoder", attn_implementation="eager", dtype=torch.float32),
            CLIPTextModelWithProjection.from_pretrained(
                root / "text_encoder_2", attn_implementation="eager", dtype=torch.float32
            ),
            CLIPTokenizer.from_pretrained(root / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(second) if second.is_dir() else None,
            prediction=prediction,
            schedule=schedule,
            size=size,
        )
        network: Any = UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32)
        return family, explicit_attention(network)

    @classmethod
    def from_config(cls, configs: Mapping[str, Any], *, size: tuple[int, int] | None = None) -> tuple[Sdxl, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        prediction, schedule = discrete(configs["scheduler"], "the scheduler's config")
        family = cls(
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder_2"])),
            None,
            prediction=prediction,
            schedule=schedule,
            size=size,
        )
        return family, UNet2DConditionModel.from_config(configs["unet"])

    def new_network(self) -> Any:
        if self._unet is None:
            raise ValueError("this family was loaded from a folder, which has its network; recipes name a fresh one")
        m = self._unet
        pooled = self.text_encoder_2.config.projection_dim
        time_dim = 16
        network: Any = UNet2DConditionModel(
            sample_size=self.size[0] // self.stride,
            in_channels=self.vae.config.latent_channels,
            out_channels=self.vae.config.latent_channels,
            block_out_channels=m.block_out_channels,
            layers_per_block=m.layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in m.attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(m.attention)),
            transformer_layers_per_block=m.transformer_layers,
            attention_head_dim=tuple(c // m.head_dim for c in m.block_out_channels),
            cross_attention_dim=self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_dim,
            projection_class_embeddings_input_dim=pooled + 6 * time_dim,
            norm_num_groups=m.norm_num_groups,
            use_linear_projection=True,
        )
        return explicit_attention(network)

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
        added = {"text_embeds": condition["pooled"], "time_ids": self._time_ids(x_t)}
        return {
            "sample": x_t,
            "timestep": t,
            "encoder_hidden_states": condition["prompt_embeds"],
            "added_cond_kwargs": added,
        }

    def _time_ids(self, x_t: Tensor) -> Tensor:
        height, width = x_t.shape[-2] * self.stride, x_t.shape[-1] * self.stride
        row = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return moved(row, x_t.device).expand(len(x_t), 6)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Penultimate hidden states of both encoders side by side, and the second's pooled projection."""
        first = self.text_encoder(input_ids=self._ids(self.tokenizer, prompts), output_hidden_states=True)
        second = self.text_encoder_2(input_ids=self._ids(self.tokenizer_2, prompts), output_hidden_states=True)
        embeds = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
        return {"prompt_embeds": embeds, "pooled": second.text_embeds}

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        ids: Tensor = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return moved(ids, self.device)

    def unconditional(self, n: int) -> Condition:
        """Zeros, as SDXL was trained; not the embedding of "", which is another input."""
        first, second = self.text_encoder.config, self.text_encoder_2.config
        length, width = first.max_position_embeddings, first.hidden_size + second.hidden_size
        return {
            "prompt_embeds": torch.zeros(n, length, width, device=self.device),
            "pooled": torch.zeros(n, second.projection_dim, device=self.device),
        }

    blank = unconditional

    def save(self, network: nn.Module, folder: Path) -> None:
        pipeline = StableDiffusionXLPipeline(
            vae=copy.deepcopy(self.vae),
            text_encoder=copy.deepcopy(self.text_encoder),
            text_encoder_2=copy.deepcopy(self.text_encoder_2),
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=copy.deepcopy(network),
            scheduler=LCMScheduler(
                beta_start=self.schedule.beta_start,
                beta_end=self.schedule.beta_end,
                beta_schedule="scaled_linear",
                num_train_timesteps=self.schedule.num_timesteps,
                original_inference_steps=self.schedule.num_timesteps,
                prediction_type=PREDICTION_TYPES[self.prediction],
                rescale_betas_zero_snr=self.schedule.zero_terminal,
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
        save_pipeline(pipeline, folder)
