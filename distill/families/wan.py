"""Wan2.1's family: WanTransformer3DModel on AutoencoderKLWan latents, a UMT5 encoder, flow matching with a shift.

x_t = (1 − t)·x0 + t·ε, the network predicts ε − x0 and reads 1000·t. Traps kept in one place:

* Latents are normalised by a mean and a deviation per channel; without them colours are washed out.
* The unconditional input is the embedding of a long Chinese prompt; "" gives other, worse videos.
* Text embeddings are 512 rows long and zero beyond the prompt: the encoder's own output for padding is not zero.
* Prompts are cleaned as diffusers does it (with ftfy where it is installed; Wan's own code always does).
* The time shift is one number for teacher, fake score, student, re-noising and sampler: it lives in the schedule.
  diffusers' folders name 3 (for 480p); Self-Forcing and FastGen train with 5, Wan's own wrapper defaults to 8.
* Norms of queries and keys have float32 weights, and get bfloat16 under autocast: torch has no fused kernel for that
  pair and warns, so they get their input in the precision of their weights.
* UMT5 leaves float16's range: its weights are taken as they are stored (bfloat16), or float32 in the place of float16.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from distill.config import WanModel, WanSource
from distill.families.base import Condition, Prediction, coefficients
from distill.families.parts import (
    Parts,
    Remembered,
    check_size,
    decoded,
    explicit_attention,
    same_precision,
    scene_preview,
    without_float16,
)
from distill.families.schedulers import flow, read_config
from distill.families.taps import tapped
from distill.math import convert
from distill.parallel.context import whole_sequence
from distill.parallel.device import moved
from distill.sampling import Flow
from distill.tasks.common import freeze, save_half

log = logging.getLogger(__name__)

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
"""Wan's own (wan/configs/shared_config.py, sample_neg_prompt)."""
MAX_TOKENS = 512
TIME_SCALE = 1000.0
SIZE, FRAMES = (832, 480), 81
"""Wan2.1-T2V-1.3B's training size: 21 latent frames of 60 × 104, 32,760 tokens."""
FPS = 16.0
"""Wan2.1's frames per second."""


class Wan(Parts):
    """The parts that all roles share: autoencoder, text encoder, tokenizer and the schedule."""

    name, prediction = "wan", "flow"
    part_names = ("vae", "text_encoder")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        *,
        schedule: Flow | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float = FPS,
        transformer: WanModel | None = None,
        patch: int = 2,
    ) -> None:
        """vae: AutoencoderKLWan; text_encoder: UMT5EncoderModel; size: (width, height) in pixels.

        transformer: sizes of ``new_network``'s. patch: latents on a side of what the network makes a token.
        """
        self.vae: Any = freeze(vae)
        self.text_encoder: Any = freeze(text_encoder)
        self.tokenizer, self.schedule = tokenizer, schedule or Flow(5.0)
        self.size, self.frames = size or SIZE, frames or FRAMES
        self.fps, self.transformer, self.patch = fps, transformer, patch
        self.max_tokens = MAX_TOKENS if tokenizer is None else min(MAX_TOKENS, tokenizer.model_max_length)
        self.stride, self.frame_stride = int(vae.config.scale_factor_spatial), int(vae.config.scale_factor_temporal)
        self._empty = Remembered()

    @classmethod
    def from_source(cls, source: WanSource, *, size: int, frames: int, fps: float) -> Wan:
        """From its parts in separate folders; ``new_network`` makes a fresh transformer."""
        return cls(
            AutoencoderKLWan.from_pretrained(source.vae, torch_dtype=torch.float32),
            UMT5EncoderModel.from_pretrained(source.text_encoder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(Path(source.text_encoder) / "tokenizer"),
            schedule=Flow(source.shift),
            size=(size, size),
            frames=frames,
            fps=fps,
            transformer=source.transformer,
            patch=source.transformer.patch,
        )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float = FPS,
        shift: float | None = None,
    ) -> tuple[Wan, Any]:
        """From a diffusers folder: the family and the network in it. shift: in the place of the folder's."""
        root = Path(folder)
        schedule = flow(read_config(root / "scheduler" / "scheduler_config.json"), str(root), shift)
        if find_spec("ftfy") is None:
            log.warning("ftfy is not installed: prompts with broken characters are not repaired as Wan repairs them")
        encoder = UMT5EncoderModel.from_pretrained(root / "text_encoder", dtype="auto")
        if encoder.dtype is torch.float16:
            encoder = encoder.float()
        network: Any = WanTransformer3DModel.from_pretrained(root / "transformer", torch_dtype=torch.float32)
        family = cls(
            AutoencoderKLWan.from_pretrained(root / "vae", torch_dtype=torch.float32),
            encoder,
            AutoTokenizer.from_pretrained(root / "tokenizer"),
            schedule=schedule,
            size=size,
            frames=frames,
            fps=fps,
            patch=network.config.patch_size[2],
        )
        return family, explicit_attention(same_precision(network))

    @classmethod
    def from_config(
        cls,
        configs: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        shift: float | None = None,
    ) -> tuple[Wan, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        encoder: Any = UMT5EncoderModel(UMT5Config.from_dict(configs["text_encoder"]))
        network: Any = WanTransformer3DModel.from_config(configs["transformer"])
        family = cls(
            AutoencoderKLWan.from_config(configs["vae"]),
            encoder.to(torch.bfloat16),
            None,
            schedule=flow(configs["scheduler"], "the scheduler's config", shift),
            size=size,
            frames=frames,
            patch=network.config.patch_size[2],
        )
        return family, explicit_attention(same_precision(network))

    def new_network(self) -> Any:
        if self.transformer is None:
            raise ValueError("this family was loaded from a folder, which has its network; give the teacher's folder")
        sizes, channels = self.transformer, int(self.vae.config.z_dim)
        network = WanTransformer3DModel(
            patch_size=(1, self.patch, self.patch),
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.width // sizes.heads,
            in_channels=channels,
            out_channels=channels,
            text_dim=self.text_encoder.config.d_model,
            ffn_dim=sizes.feed_forward,
            num_layers=sizes.layers,
        )
        return explicit_attention(same_precision(network))

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """x_t: (B, C, F, h, w). Taps: ``mid`` is the middle block's tokens, frames stacked, (B, D, F·h', w')."""
        blocks = network.blocks if taps else ()
        with tapped({"mid": blocks[len(blocks) // 2]} if taps else {}, taps) as tokens:
            output = network(**self.inputs(x_t, t, condition), return_dict=False)[0]
        across = x_t.shape[-1] // network.config.patch_size[2] if taps else 0
        tokens = {name: whole_sequence(network, f) for name, f in tokens.items()}
        features = {name: f.transpose(1, 2).unflatten(2, (-1, across)) for name, f in tokens.items()}
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert(self.prediction, x_t, output, alpha, sigma), features=features)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's forward takes, by name."""
        return {
            "hidden_states": x_t,
            "timestep": TIME_SCALE * t.float(),
            "encoder_hidden_states": condition["prompt_embeds"],
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """UMT5's last hidden states, zero beyond each prompt's end: prompt_embeds (B, 512, D) float32.

        A tokenizer for shorter prompts has fewer rows; diffusers' pipeline then wants them as max_sequence_length.
        """
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask
        with without_float16(self.device):
            states = self.text_encoder(tokens.input_ids, mask).last_hidden_state
        return {"prompt_embeds": states.float() * mask[..., None]}

    def unconditional(self, n: int) -> Condition:
        return self._empty.rows(self, NEGATIVE_PROMPT, n)

    def blank(self, n: int) -> Condition:
        """Zeros of a condition's shape."""
        return {"prompt_embeds": torch.zeros(n, self.max_tokens, self.text_encoder.config.d_model, device=self.device)}

    def latent_shape(self, size: tuple[int, int] | None = None, frames: int | None = None) -> tuple[int, ...]:
        """(C, F, h, w): pixels by the stride, frames 1 + 4·n as n + 1."""
        width, height = size or self.size
        count = frames or self.frames
        patches = f"Wan, which cuts latents into patches of {self.patch} × {self.patch},"
        check_size((width, height), self.patch * self.stride, patches)
        if count % self.frame_stride != 1:
            raise ValueError(f"frames is {count}; use 1 more than a multiple of {self.frame_stride}, such as {FRAMES}")
        latent_frames = (count - 1) // self.frame_stride + 1
        return (self.vae.config.z_dim, latent_frames, height // self.stride, width // self.stride)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents per channel, (1, C, 1, 1, 1)."""
        pair = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (moved(torch.tensor(row, dtype=torch.float32), like.device) for row in pair)
        return mean.reshape(1, -1, 1, 1, 1), std.reshape(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Videos (B, 3, F, H, W) or pictures (B, 3, H, W) in [−1, 1] to normalised latents (B, C, F', h, w)."""
        video = images if images.ndim == 5 else images[:, :, None]
        z = self.vae.encode(video).latent_dist.mode()
        mean, std = self._statistics(z)
        return (z - mean) / std  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, F', h, w) to videos (B, 3, F, H, W) float32 in [−1, 1]."""
        mean, std = self._statistics(latents)
        return decoded(self.vae, latents * std + mean)

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (WanTransformerBlock,)

    def lora_targets(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def save(self, network: nn.Module, folder: Path) -> None:
        """A WanPipeline whose scheduler draws fresh noise between steps, as the student learned it."""
        save_half(network, folder / "transformer")
        save_half(self.vae, folder / "vae")
        if self.text_encoder.dtype is torch.bfloat16:
            self.text_encoder.save_pretrained(folder / "text_encoder")
        else:
            save_half(self.text_encoder, folder / "text_encoder")
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=self.schedule.shift, stochastic_sampling=True)
        scheduler.save_pretrained(folder / "scheduler")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        pipeline: Any = WanPipeline(self.tokenizer, self.text_encoder, self.vae, scheduler, network)
        pipeline.save_config(folder)

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "task": "text-to-video",
            "prediction": self.prediction,
            "latent_channels": int(self.vae.config.z_dim),
            "latent_stride": self.stride,
            "sizes": (self.size,),
            "frames": (self.frames,),
            "frame_stride": self.frame_stride,
            "fps": self.fps,
            "max_tokens": self.max_tokens,
            "preview": scene_preview(self),
        }
