"""SiT's and DiT's family: a class-conditional DiTTransformer2DModel on pixels or on AutoencoderKL latents.

SiT is flow matching: x_t = (1 − t)·x0 + t·ε, the network predicts ε − x0 and reads 1000·t (SiT's own code runs time and
sign the other way; distill.convert turns its checkpoints). DiT predicts ε on 1000 discrete timesteps, and a variance
in further channels that nothing here reads. The last label, one beyond the classes, is the unconditional input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from distill.config import SitModel
from distill.families.base import Condition, Prediction, coefficients, preview_matrix
from distill.families.parts import Parts, check_size, decoded, explicit_attention, scene_preview
from distill.families.schedulers import discrete, flow, is_flow, read_config
from distill.families.taps import tapped
from distill.math import convert
from distill.parallel.device import moved
from distill.sampling import Flow, ScaledLinear
from distill.tasks.common import freeze, save_half

TIME_SCALE = 1000.0


class Sit(Parts):
    """Conditions are labels. Without an autoencoder latents are pictures in [−1, 1]."""

    name = "sit"
    part_names = ("vae",)

    def __init__(
        self,
        model: SitModel | None = None,
        *,
        vae: Any = None,
        prediction: str = "flow",
        schedule: Flow | ScaledLinear | None = None,
        classes: int = 10,
        channels: int = 1,
        side: int = 8,
    ) -> None:
        """model: a fresh network's size; vae: AutoencoderKL; channels, side: of the latents that the network sees."""
        self.vae: Any = None if vae is None else freeze(vae)
        self.prediction, self.schedule = prediction, schedule or Flow()
        self.classes, self.channels, self._model = classes, channels, model
        self.stride = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = (side * self.stride,) * 2

    @classmethod
    def from_folder(cls, folder: str | Path) -> tuple[Sit, Any]:
        """From a diffusers folder: transformer, vae unless it works on pixels, and scheduler if it is not SiT's."""
        root = Path(folder)
        network = DiTTransformer2DModel.from_pretrained(root / "transformer", torch_dtype=torch.float32)
        latent = (root / "vae").is_dir()
        vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32) if latent else None
        return cls._around(network, vae, read_config(root / "scheduler" / "scheduler_config.json"), str(root))

    @classmethod
    def from_config(cls, configs: Mapping[str, Any]) -> tuple[Sit, Any]:
        """From the configs of a diffusers folder by component, with fresh weights (none on the meta device)."""
        vae = AutoencoderKL.from_config(configs["vae"]) if "vae" in configs else None
        network = DiTTransformer2DModel.from_config(configs["transformer"])
        return cls._around(network, vae, configs.get("scheduler", {}), "the scheduler's config")

    @classmethod
    def _around(cls, network: Any, vae: Any, scheduler: dict[str, Any], where: str) -> tuple[Sit, Any]:
        """The family of a network: flow matching unless the scheduler's config says otherwise."""
        prediction: str = "flow"
        schedule: Flow | ScaledLinear = Flow()
        if scheduler and is_flow(scheduler):
            schedule = flow(scheduler, where)
        elif scheduler:
            prediction, schedule = discrete(scheduler, where)
        c = network.config
        shape = {"classes": c.num_embeds_ada_norm, "channels": c.in_channels, "side": c.sample_size}
        return cls(vae=vae, prediction=prediction, schedule=schedule, **shape), _prepare(network)

    def new_network(self) -> Any:
        if self._model is None:
            raise ValueError("this family was loaded from a folder, which has its network; recipes name a fresh one")
        m = self._model
        network = DiTTransformer2DModel(
            sample_size=self.size[0],
            in_channels=1,
            out_channels=1,
            patch_size=m.patch,
            num_layers=m.layers,
            num_attention_heads=m.heads,
            attention_head_dim=m.width // m.heads,
            num_embeds_ada_norm=self.classes,
            norm_num_groups=1,
        )
        return _prepare(network)

    def predict(
        self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        """Taps: ``mid`` is the middle block's tokens as a map, (B, width, h', w')."""
        blocks = network.transformer_blocks if taps else ()
        with tapped({"mid": blocks[len(blocks) // 2]} if taps else {}, taps) as tokens:
            output = network(**self.inputs(x_t, t, condition), return_dict=False)[0]
        side = x_t.shape[-1] // network.config.patch_size if taps else 0
        features = {name: f.transpose(1, 2).unflatten(2, (-1, side)) for name, f in tokens.items()}
        alpha, sigma = coefficients(self.schedule, t)
        return Prediction(*convert(self.prediction, x_t, output[:, : x_t.shape[1]], alpha, sigma), features=features)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's forward takes, by name."""
        timestep = TIME_SCALE * t.float() if self.prediction == "flow" else t
        return {"hidden_states": x_t, "timestep": timestep, "class_labels": condition["labels"]}

    def encode(self, prompts: Sequence[int]) -> Condition:
        labels = torch.as_tensor(list(prompts), dtype=torch.int64)
        if len(labels) and (labels.min() < 0 or labels.max() >= self.classes):
            raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}; use 0 to {self.classes - 1}")
        return {"labels": moved(labels, self.device)}

    def unconditional(self, n: int) -> Condition:
        return {"labels": torch.full((n,), self.classes, dtype=torch.int64, device=self.device)}

    blank = unconditional

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        if size not in (None, self.size):
            raise ValueError(f"size is {size}; this network takes {self.size[0]} × {self.size[1]} alone")
        check_size(self.size, self.stride, "this autoencoder")
        return (self.channels, self.size[1] // self.stride, self.size[0] // self.stride)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] to latents in model scale: the posterior's mean times the scaling factor."""
        if self.vae is None:
            return images[:, : self.channels]
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.expand(-1, 3, -1, -1)
        return decoded(self.vae, latents / self.vae.config.scaling_factor)

    def wrap_plan(self) -> tuple[type[nn.Module], ...]:
        return (BasicTransformerBlock,)

    def lora_targets(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def save(self, network: nn.Module, folder: Path) -> None:
        """The transformer; with an autoencoder, a DiTPipeline's whole folder."""
        save_half(network, folder / "transformer")
        if self.vae is None:
            return
        save_half(self.vae, folder / "vae")
        scheduler = self._scheduler()
        scheduler.save_pretrained(folder / "scheduler")
        pipeline: Any = DiTPipeline(network, self.vae, scheduler)
        pipeline.save_config(folder)

    def _scheduler(self) -> Any:
        if isinstance(self.schedule, Flow):
            return FlowMatchEulerDiscreteScheduler(shift=self.schedule.shift, stochastic_sampling=True)
        return DDIMScheduler(
            beta_start=self.schedule.beta_start,
            beta_end=self.schedule.beta_end,
            beta_schedule="linear" if self.schedule.linear else "scaled_linear",
            timestep_spacing="trailing",
            clip_sample=False,
        )

    def describe(self) -> dict[str, Any]:
        identity = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        pixels = preview_matrix(identity, identity.expand(-1, 3, -1, -1))
        return {
            "family": self.name,
            "task": "class-to-image",
            "prediction": self.prediction,
            "latent_channels": self.channels,
            "latent_stride": self.stride,
            "sizes": (self.size,),
            "preview": pixels if self.vae is None else scene_preview(self),
        }


def _prepare(network: Any) -> Any:
    """Explicit attention where that is faster, and no label dropout of the network's own: tasks drop conditions."""
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return explicit_attention(network)
