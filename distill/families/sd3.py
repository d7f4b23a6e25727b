"""Stable Diffusion 3's family: SD3Transformer2DModel, two CLIP text encoders and T5, flow matching with shift 3.

For SD3 and SD3.5, medium and large: what they differ in (norms of queries and keys, blocks with a second attention)
stands in the network's config. Traps beside those of distill.families.mmdit:

* The two CLIPs' penultimate states stand side by side, filled with zeros to T5's width, before T5's rows; both pooled
  projections stand side by side too. Each CLIP has a tokenizer of its own, and the second one pads with "!".
* T5 may be left out, as diffusers allows: its 256 rows are zeros then, for every prompt.
* The network reads 1000·t. Its positions are cut out of the middle of a larger map, so they depend on the size.
* The shift is one static number, 3, for teacher, fake score, student, re-noising and sampler. diffusers' own grid warps
  the ends of its range twice: for few steps give the pipeline ``sigmas`` = 1, 1 − 1/n, …, 1/n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from distill.families.base import Condition, Prediction, coefficients
from distill.families.mmdit import Mmdit, log, schedule_for, t5_from_folder
from distill.families.parts import same_precision
from distill.families.schedulers import read_config
from distill.families.taps import tapped
from distill.math import convert

TIME_SCALE = 1000.0
SIZE = (1024, 1024)
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Sd3(Mmdit):
    """The parts that all roles share: autoencoder, text encoders, tokenizers and the schedule."""

    name, max_tokens = "sd3", 256
    text_encoder: Any
    text_encoder_2: Any
    text_encoder_3: Any

    def __init__(
        self, vae: Any, encoders: Sequence[Any], tokenizers: Sequence[Any], width: int, **options: Any
    ) -> None:
        """encoders: two CLIPTextModelWithProjection and a T5EncoderModel or None; width: of the network's text."""
        super().__init__(vae, dict(zip(ENCODERS, encoders, strict=True)), **options)
        self.tokenizers, self.width = list(tokenizers), width

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, size: tuple[int, int] | None = None, shift: float | None = None
    ) -> tuple[Sd3, Any]:
        """From a diffusers folder: the family and the network in it. shift: in the place of the folder's."""
        root, size = Path(folder), size or SIZE
        config = read_config(root / "scheduler" / "scheduler_config.json")
        vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32)
        clips = [CLIPTextModelWithProjection.from_pretrained(root / e, dtype=torch.float32) for e in ENCODERS[:2]]
        words: list[Any] = [CLIPTokenizer.from_pretrained(root / name) for name in TOKENIZERS[:2]]
        has_t5 = (root / ENCODERS[2] / "config.json").is_file()
        if not has_t5:
            log.warning("%s has no text_encoder_3: prompts are read by CLIP alone, T5's rows are zeros", root)
        network: Any = SD3Transformer2DModel.from_pretrained(root / "transformer", torch_dtype=torch.float32)
        family = cls(
            vae,
            [*clips, t5_from_folder(root / ENCODERS[2]) if has_t5 else None],
            [*words, AutoTokenizer.from_pretrained(root / TOKENIZERS[2]) if has_t5 else None],
            network.config.joint_attention_dim,
            schedule=schedule_for(config, str(root), vae, size, shift),
            size=size,
        )
        return family, same_precision(network)

    @classmethod
    def from_config(
        cls, configs: Mapping[str, Any], *, size: tuple[int, int] | None = None, shift: float | None = None
    ) -> tuple[Sd3, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        vae, size = AutoencoderKL.from_config(configs["vae"]), size or SIZE
        encoders: list[Any] = [CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs[e])) for e in ENCODERS[:2]]
        t5: Any = T5EncoderModel(T5Config.from_dict(configs[ENCODERS[2]])) if ENCODERS[2] in configs else None
        encoders.append(t5 and t5.to(torch.bfloat16))
        network = SD3Transformer2DModel.from_config(configs["transformer"])
        family = cls(
            vae,
            encoders,
            [None] * 3,
            network.config.joint_attention_dim,
            schedule=schedule_for(configs["scheduler"], "the scheduler's config", vae, size, shift),
            size=size,
        )
        return family, same_precision(network)

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """Taps: ``mid`` is the middle block's tokens of the picture, (B, D, h', w')."""
        blocks = network.transformer_blocks if taps else ()
        with tapped({"mid": blocks[len(blocks) // 2]} if taps else {}, taps, place=1) as tokens:
            output = network(**self.inputs(x_t, t, condition), return_dict=False)[0]
        across = x_t.shape[-1] // network.config.patch_size if taps else 0
        features = {name: f.transpose(1, 2).unflatten(2, (-1, across)) for name, f in tokens.items()}
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert(self.prediction, x_t, output, alpha, sigma), features=features)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's forward takes, by name."""
        return {
            "hidden_states": x_t,
            "timestep": TIME_SCALE * t.float(),
            "encoder_hidden_states": condition["prompt_embeds"],
            "pooled_projections": condition["pooled"],
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """prompt_embeds (B, 77 + 256, D): CLIP's rows, then T5's; pooled (B, P1 + P2). float32."""
        clips = [
            encoder(input_ids=self._clip_ids(tokenizer, prompts), output_hidden_states=True)
            for encoder, tokenizer in zip((self.text_encoder, self.text_encoder_2), self.tokenizers, strict=False)
        ]
        rows = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1).float()
        rows = nn.functional.pad(rows, (0, self.width - rows.shape[-1]))
        if self.text_encoder_3 is None:
            t5 = rows.new_zeros(len(prompts), self.max_tokens, self.width)
        else:
            t5 = self._t5_states(self.text_encoder_3, self.tokenizers[2], prompts)
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1).float()
        return {"prompt_embeds": torch.cat((rows, t5), dim=1), "pooled": pooled}

    def blank(self, n: int) -> Condition:
        """Zeros of a condition's shapes."""
        first, second = self.text_encoder.config, self.text_encoder_2.config
        rows, pooled = first.max_position_embeddings + self.max_tokens, first.projection_dim + second.projection_dim
        return {
            "prompt_embeds": torch.zeros(n, rows, self.width, device=self.device),
            "pooled": torch.zeros(n, pooled, device=self.device),
        }

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (JointTransformerBlock,)

    def save(self, network: nn.Module, folder: Path) -> None:
        self._save(StableDiffusion3Pipeline, network, folder, dict(zip(TOKENIZERS, self.tokenizers, strict=True)))
