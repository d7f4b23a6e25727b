"""What export compiles: small torch modules over plain diffusers and transformers models. No exporter imports.

A student is two or three graphs with named inputs and outputs; the batch B is free in each of them:

    text_encoder  input_ids (B, L) int64 -> prompt_embeds (B, L, D), pooled (B, P)
    step          latents (B, C, h, w), timestep (B,), coefficients (B, 5), noise (B, C, h, w) and the conditioning
                  (prompt_embeds and pooled, or labels (B,) int64) -> next, x0 (B, C, h, w)
    decoder       latents (B, C, h, w) in model scale -> image (B, H, W, 3) uint8

Everything is float32 unless said otherwise. The sampler enters ``step`` as a row of numbers (see distill.sampling), so
rows of one batch may stand at different steps and no scheduler is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.bundle import BundleError, Manifest

Inputs = dict[str, Tensor]
GraphName = Literal["text_encoder", "step", "decoder", "decoder_next"]


class SdxlTextEncoder(nn.Module):
    """SDXL's two text encoders behind one input: the same tokens, filled up to L as each was trained.

    input_ids: (B, L) int64, filled up with the end token. Returns prompt_embeds (B, L, D1 + D2), the penultimate hidden
    states side by side, and pooled (B, P), the second encoder's projection of its end token.
    end, pad: ids of the end token and of what the second encoder is filled up with behind it; published SDXL has "!"
    there, id 0. pad None: the end token again.
    """

    def __init__(
        self, text_encoder: nn.Module, text_encoder_2: nn.Module, *, end: int = 0, pad: int | None = None
    ) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.end, self.pad = end, pad

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(input_ids=input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids=self._filled(input_ids), output_hidden_states=True)
        return torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1), second.text_embeds

    def _filled(self, ids: Tensor) -> Tensor:
        """The ids with ``pad`` behind the first of the end tokens that close a row; those within a prompt stay."""
        if self.pad is None:
            return ids
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(ids != self.end, places, 0).amax(dim=1, keepdim=True)
        return torch.where(places > last + 1, self.pad, ids)


def affine_step(latents: Tensor, output: Tensor, coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = p·x + q·m and next = u·x0 + y·x + w·z with one row (p, q, u, y, w) per picture.

    latents, output, noise: (B, C, h, w), of videos (B, C, f, h, w); coefficients: (B, 5). Returns (next, x0).
    """
    p, q, u, y, w = (column.reshape(-1, *(1,) * (latents.ndim - 1)) for column in coefficients.unbind(1))
    x0 = p * latents + q * output
    return u * x0 + y * latents + w * noise, x0


def guided(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the standard form u + scale·(c − u). output: (2B, …), conditional rows first.

    Slices, because the exporter cannot fold a chunk along a free batch.
    """
    batch = output.shape[0] // 2
    conditional, unconditional = output[:batch], output[batch:]
    return unconditional + scale * (conditional - unconditional)


class SdxlStep(nn.Module):
    """One sampler step of an SDXL-type UNet.

    stride: pixels per latent, from which SDXL's size conditioning (H, W, 0, 0, H, W) is made.
    guidance_scale: 1 is one network call per step; otherwise the unconditional half of a doubled batch sees zeros as
    text, as SDXL was trained.
    """

    def __init__(self, unet: nn.Module, stride: int, guidance_scale: float = 1.0) -> None:
        super().__init__()
        self.unet, self.stride, self.guidance_scale = unet, stride, guidance_scale

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, t = latents, timestep
        if self.guidance_scale != 1.0:
            x, t = torch.cat((x, x)), torch.cat((t, t))
            prompt_embeds = torch.cat((prompt_embeds, torch.zeros_like(prompt_embeds)))
            pooled = torch.cat((pooled, torch.zeros_like(pooled)))
        output = self.unet(
            x,
            t,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self._time_ids(latents, t)},
            return_dict=False,
        )[0]
        if self.guidance_scale != 1.0:
            output = guided(output, self.guidance_scale)
        return affine_step(latents, output, coefficients, noise)

    def _time_ids(self, latents: Tensor, like: Tensor) -> Tensor:
        height, width = latents.shape[-2] * self.stride, latents.shape[-1] * self.stride
        row = torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype, device=latents.device)
        return row[None].expand(like.shape[0], 6)


class SitStep(nn.Module):
    """One sampler step of a class-conditional DiT that predicts the flow ε − x0 at time t in [0, 1].

    labels: (B,) int64 in [0, num_classes); num_classes itself is the unconditional label.
    time_scale: the transformer's sinusoid reads time_scale·t.
    """

    def __init__(
        self, transformer: nn.Module, num_classes: int, guidance_scale: float = 1.0, time_scale: float = 1000.0
    ) -> None:
        super().__init__()
        self.transformer, self.num_classes = transformer, num_classes
        self.guidance_scale, self.time_scale = guidance_scale, time_scale

    def forward(
        self, latents: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, t = latents, timestep * self.time_scale
        if self.guidance_scale != 1.0:
            x, t = torch.cat((x, x)), torch.cat((t, t))
            labels = torch.cat((labels, torch.full_like(labels, self.num_classes)))
        output = self.transformer(x, timestep=t, class_labels=labels, return_dict=False)[0]
        if self.guidance_scale != 1.0:
            output = guided(output, self.guidance_scale)
        return affine_step(latents, output, coefficients, noise)


def to_uint8(image: Tensor) -> Tensor:
    """(B, C, …, H, W) in [-1, 1] to (B, …, H, W, 3) uint8; one channel is repeated. The cast is the last operation.

    TensorRT refuses uint8 anywhere but at the end of a graph.
    """
    if image.shape[1] == 1:
        image = image.expand(-1, 3, *(-1,) * (image.ndim - 2))
    levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
    return levels.movedim(1, -1).to(torch.uint8)


class VaeDecoder(nn.Module):
    """Latents in model scale to pictures: latents (B, C, h, w) -> image (B, H, W, 3) uint8."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        config: Any = vae.config
        self.vae, self.scale = vae, float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        decode: Any = self.vae.decode
        return to_uint8(decode(latents / self.scale + self.shift, return_dict=False)[0])


class PixelDecoder(nn.Module):
    """The decoder of a student that works on pixels: latents (B, 1 or 3, H, W) -> image (B, H, W, 3) uint8."""

    def forward(self, latents: Tensor) -> Tensor:
        return to_uint8(latents)


@dataclass(frozen=True)
class GraphSpec:
    """One graph to compile.

    draw: (batch, generator[, size]) -> inputs by name in the order of ``forward``, as the graph meets them in service;
    size is (height, width) in latents, one of ``sizes``, which is empty where pictures of all sizes are alike.
    dims: per input and output its shape, a name where the axis is free; the first axis is always "batch".
    reference: what the first output is held against where ``module`` is a rewrite of it.
    """

    name: GraphName
    module: nn.Module
    draw: Callable[..., Inputs]
    dims: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    reference: nn.Module | None = None
    inputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(name for name in self.dims if name not in self.outputs))

    def sample(self, batch: int, generator: torch.Generator, size: tuple[int, int] | None = None) -> Inputs:
        """Random inputs of ``batch`` rows; size: one of ``sizes``, drawn too if None."""
        if not self.sizes:
            return self.draw(batch, generator)
        drawn = int(torch.randint(len(self.sizes), (1,), generator=generator))
        return self.draw(batch, generator, size or self.sizes[drawn])

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Inputs:
        """The torch reference: outputs by name."""
        arguments = [inputs[name] for name in self.inputs]
        result = self.module(*arguments)
        outputs = dict(zip(self.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        if self.reference is not None:
            outputs[self.outputs[0]] = self.reference(*arguments)
        return outputs


def text_graph(module: nn.Module, manifest: Manifest, *, vocabulary: int, begin: int, end: int) -> GraphSpec:
    """The text encoder of a bundle. vocabulary, begin, end: number of tokens and the ids that frame a prompt."""
    if manifest.max_tokens is None:
        raise ValueError(f"max_tokens is None for {manifest.name}; a text-to-image bundle needs its prompt length")
    length = manifest.max_tokens

    def sample(batch: int, generator: torch.Generator) -> Inputs:
        ids = torch.randint(min(begin, end), (batch, length), generator=generator)
        words = torch.randint(1, length - 1, (batch, 1), generator=generator)
        ids = torch.where(torch.arange(length) > words, end, ids)
        ids[:, 0] = begin
        return {"input_ids": ids}

    if not 0 < min(begin, end) < vocabulary:
        raise ValueError(f"tokens begin={begin}, end={end} of {vocabulary}; a CLIP vocabulary ends with these two")
    embeds, pooled = module(**sample(2, torch.Generator().manual_seed(0)))
    dims: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", length),
        "prompt_embeds": ("batch", length, int(embeds.shape[-1])),
        "pooled": ("batch", int(pooled.shape[-1])),
    }
    return GraphSpec("text_encoder", module, sample, dims, ("prompt_embeds", "pooled"))


def step_graph(
    module: nn.Module, manifest: Manifest, conditioning: Mapping[str, tuple[int, ...]], num_classes: int = 0
) -> GraphSpec:
    """One sampler step of a bundle. conditioning: input shapes without the batch, in the order of ``forward``."""
    shape = latent_dims(manifest)
    tables = [sampler.table() for _, sampler in sorted(manifest.samplers.items())]
    timesteps = torch.cat([torch.from_numpy(table.timesteps) for table in tables])
    rows = torch.cat([torch.from_numpy(table.rows) for table in tables])
    latest = int(timesteps.argmax())

    def draw(batch: int, generator: torch.Generator, sides: tuple[int, int]) -> Inputs:
        size = (batch, manifest.latent_channels, *_some_frames(manifest, batch), *sides)
        which = torch.randint(len(timesteps), (batch,), generator=generator)
        which[0] = latest  # the sinusoid is hardest at the noisiest time, where every sampler starts
        inputs = {
            "latents": torch.randn(size, generator=generator),
            "timestep": timesteps[which],
            "coefficients": rows[which],
            "noise": torch.randn(size, generator=generator),
        }
        for name, rest in conditioning.items():
            if name == "labels":
                inputs[name] = torch.randint(num_classes, (batch,), generator=generator)
            else:
                inputs[name] = torch.randn(batch, *rest, generator=generator)
        return inputs

    dims: dict[str, tuple[int | str, ...]] = {"latents": shape, "timestep": ("batch",), "coefficients": ("batch", 5)}
    dims |= {"noise": shape} | {name: ("batch", *rest) for name, rest in conditioning.items()}
    return GraphSpec("step", module, draw, dims | {"next": shape, "x0": shape}, ("next", "x0"), latent_sizes(manifest))


def decoder_graph(module: nn.Module, manifest: Manifest) -> GraphSpec:
    """The decoder of a bundle."""
    shape = latent_dims(manifest)

    def draw(batch: int, generator: torch.Generator, sides: tuple[int, int]) -> Inputs:
        return {"latents": torch.randn((batch, manifest.latent_channels, *sides), generator=generator)}

    sides = [side * manifest.latent_stride if isinstance(side, int) else f"image_{side}" for side in shape[2:]]
    dims: dict[str, tuple[int | str, ...]] = {"latents": shape, "image": ("batch", *sides, 3)}
    return GraphSpec("decoder", module, draw, dims, ("image",), latent_sizes(manifest))


def latent_sizes(manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """(height, width) in latents of each of the bundle's sizes."""
    stride = manifest.latent_stride
    return tuple((height // stride, width // stride) for width, height in manifest.sizes)


def _some_frames(manifest: Manifest, batch: int) -> tuple[int, ...]:
    """Latent frames of an example: a whole clip alone, few in a batch, none of pictures; never the number of rows."""
    if not manifest.frames:
        return ()
    return (manifest.latent_shape()[1] if batch == 1 else batch + 1,)


def latent_dims(manifest: Manifest) -> tuple[int | str, ...]:
    """The shape of latents; frames are free, and so is a side that differs between the bundle's sizes."""
    sides: list[int | str] = []
    for name, pixels in (("height", {h for _, h in manifest.sizes}), ("width", {w for w, _ in manifest.sizes})):
        wrong = [side for side in pixels if side % manifest.latent_stride]
        if wrong:
            raise ValueError(f"sizes has {name} {wrong[0]}; use multiples of latent_stride {manifest.latent_stride}")
        sides.append(name if len(pixels) > 1 else pixels.pop() // manifest.latent_stride)
    return ("batch", manifest.latent_channels, *(("frames",) if manifest.frames else ()), *sides)


# --- loading a bundle ------------------------------------------------------------------------------------------


def load_graphs(bundle_dir: Path, manifest: Manifest) -> dict[str, GraphSpec]:
    """The graphs of a bundle by name, in the order in which a picture passes them, in float32 on the CPU."""
    if manifest.family not in _LOADERS:
        raise BundleError(f"{bundle_dir} is of family {manifest.family!r}; export knows {', '.join(sorted(_LOADERS))}")
    specs = _LOADERS[manifest.family](bundle_dir, manifest)
    for spec in specs:
        spec.module.eval().requires_grad_(False)
    return {spec.name: spec for spec in specs}


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} is missing or has no config.json; write the bundle again")
    return kind.from_pretrained(folder, local_files_only=True, **options).eval()


@torch.no_grad()
def _sdxl(bundle_dir: Path, manifest: Manifest) -> list[GraphSpec]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = _load(CLIPTextModel, bundle_dir / "text_encoder", dtype=torch.float32)
    second = _load(CLIPTextModelWithProjection, bundle_dir / "text_encoder_2", dtype=torch.float32)
    unet = _load(UNet2DConditionModel, bundle_dir / "unet", torch_dtype=torch.float32)
    vae = _load(AutoencoderKL, bundle_dir / "vae", torch_dtype=torch.float32)
    config = second.config
    pad = _second_padding(bundle_dir, config.eos_token_id)
    text = text_graph(
        SdxlTextEncoder(first, second, end=config.eos_token_id, pad=pad),
        manifest,
        vocabulary=config.vocab_size,
        begin=config.bos_token_id,
        end=config.eos_token_id,
    )
    conditioning = {name: tuple(int(side) for side in text.dims[name][1:]) for name in text.outputs}
    step = SdxlStep(unet, manifest.latent_stride, manifest.guidance.scale)
    return [text, step_graph(step, manifest, conditioning), decoder_graph(VaeDecoder(vae), manifest)]


def _second_padding(bundle_dir: Path, end: int) -> int | None:
    """What the second tokenizer fills up with, None where that is the end token or both tokenizers are one."""
    from transformers import CLIPTokenizer

    if not (bundle_dir / "tokenizer_2").is_dir():
        return None
    pad = int(CLIPTokenizer.from_pretrained(bundle_dir / "tokenizer_2").pad_token_id)
    return None if pad == end else pad


def _sit(bundle_dir: Path, manifest: Manifest) -> list[GraphSpec]:
    from diffusers import DiTTransformer2DModel

    transformer = _load(DiTTransformer2DModel, bundle_dir / "transformer", torch_dtype=torch.float32)
    classes = int(transformer.config.num_embeds_ada_norm)
    step = SitStep(transformer, classes, manifest.guidance.scale)
    return [step_graph(step, manifest, {"labels": ()}, classes), decoder_graph(PixelDecoder(), manifest)]


def _wan(bundle_dir: Path, manifest: Manifest) -> list[GraphSpec]:
    from distill.export.wan import wan_graphs

    return wan_graphs(bundle_dir, manifest)


_LOADERS: dict[str, Callable[[Path, Manifest], list[GraphSpec]]] = {"sdxl": _sdxl, "sit": _sit, "wan": _wan}
