"""FLUX.1's family: FluxTransformer2DModel on packed latents, CLIP's pooled text and T5's rows, a shift by resolution.

Traps beside those of distill.families.mmdit:

* Latents are packed for the network, (B, C, h, w) to (B, h/2·w/2, 4·C), each token with its place (0, row, column);
  rows of text stand at (0, 0, 0). Here they stay (B, C, h, w) everywhere but in ``inputs``.
* CLIP gives its pooled state alone, after the final norm and without a projection; T5 has 512 rows.
* The network reads t itself, in [0, 1], and multiplies by 1000 in the precision of its activations: under bfloat16
  times are rounded to 8 bits, in the published pipeline as here.
* The shift is e^μ with μ linear in the number of tokens (0.5 at 256, 1.15 at 4096), so it belongs to the size: 3.158
  at 1024 × 1024. A student is saved with that number as a static shift.

**Embedded guidance.** FLUX.1-dev is distilled from a guided teacher and reads the scale as an input g: its one output
m(x, t, c, g) stands for u + g·(c − u). So a recipe has two numbers. ``embedded_guidance`` is g, which all roles read
with and without the prompt, as diffusers' pipeline does; ``guidance`` is ω of the teacher's second, true guidance
m("", g) + ω·(m(c, g) − m("", g)), diffusers' ``true_cfg_scale``. With ω = 1 the guidance that a student inherits is g,
inside the conditional prediction, and the alignment term (ω − 1)·d_ca of AMD's equation 10 is zero: α has nothing to
weight and adaptation acts through β alone. With ω > 1 both act, over a prediction that is guided already unless g = 1,
where m(x, t, c, 1) stands for c itself and ω has its usual meaning: what recipes/flux-dev-amd-4step.yaml does.
FLUX.1-schnell has no such input and no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from distill.families.base import Condition, Prediction, coefficients
from distill.families.mmdit import PATCH, Mmdit, schedule_for, t5_from_folder
from distill.families.parts import same_precision
from distill.families.schedulers import read_config
from distill.families.taps import tapped
from distill.math import convert

SIZE = (1024, 1024)
EMBEDDED_GUIDANCE = 3.5
"""FLUX.1-dev's own default, of its model card and of diffusers' pipeline."""
ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


class Flux(Mmdit):
    """The parts that all roles share: autoencoder, text encoders, tokenizers and the schedule."""

    name, max_tokens = "flux", 512
    text_encoder: Any
    text_encoder_2: Any

    def __init__(
        self, vae: Any, encoders: Sequence[Any], tokenizers: Sequence[Any], guidance: float | None, **options: Any
    ) -> None:
        """encoders: CLIPTextModel and T5EncoderModel; guidance: the network's input, None where it has none."""
        super().__init__(vae, dict(zip(ENCODERS, encoders, strict=True)), **options)
        self.tokenizers, self.guidance = list(tokenizers), guidance

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        size: tuple[int, int] | None = None,
        shift: float | None = None,
        embedded_guidance: float | None = None,
    ) -> tuple[Flux, Any]:
        """From a diffusers folder: the family and the network in it. shift: in the place of the folder's."""
        root, size = Path(folder), size or SIZE
        config = read_config(root / "scheduler" / "scheduler_config.json")
        vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32)
        network: Any = FluxTransformer2DModel.from_pretrained(root / "transformer", torch_dtype=torch.float32)
        family = cls(
            vae,
            [
                CLIPTextModel.from_pretrained(root / ENCODERS[0], dtype=torch.float32),
                t5_from_folder(root / ENCODERS[1]),
            ],
            [CLIPTokenizer.from_pretrained(root / TOKENIZERS[0]), AutoTokenizer.from_pretrained(root / TOKENIZERS[1])],
            _guidance(network, embedded_guidance),
            schedule=schedule_for(config, str(root), vae, size, shift),
            size=size,
        )
        return family, same_precision(network)

    @classmethod
    def from_config(
        cls,
        configs: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        shift: float | None = None,
        embedded_guidance: float | None = None,
    ) -> tuple[Flux, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        vae, size = AutoencoderKL.from_config(configs["vae"]), size or SIZE
        t5: Any = T5EncoderModel(T5Config.from_dict(configs[ENCODERS[1]]))
        network = FluxTransformer2DModel.from_config(configs["transformer"])
        family = cls(
            vae,
            [CLIPTextModel(CLIPTextConfig.from_dict(configs[ENCODERS[0]])), t5.to(torch.bfloat16)],
            [None] * 2,
            _guidance(network, embedded_guidance),
            schedule=schedule_for(configs["scheduler"], "the scheduler's config", vae, size, shift),
            size=size,
        )
        return family, same_precision(network)

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """x_t: (B, C, h, w). Taps: ``mid`` is the middle one of all blocks' tokens of the picture, (B, D, h', w')."""
        blocks = [*network.transformer_blocks, *network.single_transformer_blocks] if taps else []
        with tapped({"mid": blocks[len(blocks) // 2]} if taps else {}, taps, place=1) as tokens:
            packed = network(**self.inputs(x_t, t, condition), return_dict=False)[0]
        height, width = x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH
        features = {name: f.transpose(1, 2).unflatten(2, (height, width)) for name, f in tokens.items()}
        alpha, sigma = coefficients(self.schedule, t)
        output = unpack(packed, height, width)
        return Prediction(*convert(self.prediction, x_t, output, alpha, sigma), features=features)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's forward takes, by name."""
        rows = condition["prompt_embeds"]
        return {
            "hidden_states": pack(x_t),
            "timestep": t.float(),
            "encoder_hidden_states": rows,
            "pooled_projections": condition["pooled"],
            "img_ids": places(x_t),
            "txt_ids": torch.zeros(rows.shape[1], 3, device=x_t.device),
            "guidance": condition.get("guidance"),
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """prompt_embeds (B, 512, D) of T5, pooled (B, P) of CLIP, and guidance (B,) where the network reads it."""
        pooled = self.text_encoder(input_ids=self._clip_ids(self.tokenizers[0], prompts)).pooler_output.float()
        states = self._t5_states(self.text_encoder_2, self.tokenizers[1], prompts)
        return {"prompt_embeds": states, "pooled": pooled, **self._guided(len(prompts))}

    def _guided(self, n: int) -> Condition:
        return {} if self.guidance is None else {"guidance": torch.full((n,), self.guidance, device=self.device)}

    def blank(self, n: int) -> Condition:
        """A condition's shapes, its text zeros."""
        width, pooled = self.text_encoder_2.config.d_model, self.text_encoder.config.hidden_size
        return {
            "prompt_embeds": torch.zeros(n, self.max_tokens, width, device=self.device),
            "pooled": torch.zeros(n, pooled, device=self.device),
            **self._guided(n),
        }

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (FluxTransformerBlock, FluxSingleTransformerBlock)

    def save(self, network: nn.Module, folder: Path) -> None:
        self._save(FluxPipeline, network, folder, dict(zip(TOKENIZERS, self.tokenizers, strict=True)))


def _guidance(network: Any, asked: float | None) -> float | None:
    """The scale that a network reads. Raises ValueError where one is asked for and the network has no such input."""
    if network.config.guidance_embeds:
        return EMBEDDED_GUIDANCE if asked is None else asked
    if asked is not None:
        raise ValueError(f"embedded_guidance is {asked:g}, which this network does not read (guidance_embeds); drop it")
    return None


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h/2·w/2, 4·C): patches of 2 × 2 as tokens, channels first within a token."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for height × width tokens."""
    patches: Tensor = tokens.unflatten(1, (height, width)).unflatten(3, (-1, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def places(x: Tensor) -> Tensor:
    """(0, row, column) of every token of latents (B, C, h, w): (h/2·w/2, 3) float32."""
    height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    rows, columns = torch.meshgrid(
        torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij"
    )
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
