"""What families of latent models share: their frozen parts on one device, and the traps of precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from distill.data.cache import HELD_OUT_SEED, scene_images
from distill.families.base import Condition, preview_matrix
from distill.tasks.common import to_float


class Parts:
    """Frozen modules as attributes (None where a family has none), moved together and never trained."""

    part_names: tuple[str, ...] = ()
    placed = torch.device("cpu")
    """Where a family without parts makes its conditions."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The frozen modules by name, in the order of the diffusers folder."""
        found = {name: getattr(self, name) for name in self.part_names}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def device(self) -> torch.device:
        """Where conditions are made and latents are decoded."""
        return next((p.device for part in self.parts.values() for p in part.parameters()), self.placed)

    def to(self, device: torch.device | str) -> Self:
        """Move every frozen part."""
        self.placed = torch.device(device)
        for part in self.parts.values():
            part.to(device)
        return self


class Remembered:
    """An unconditional input that is encoded from a prompt once and kept, moved with the family's device."""

    def __init__(self) -> None:
        self._rows: Condition | None = None

    def rows(self, family: Any, prompt: str, n: int) -> Condition:
        """n rows of the prompt's condition, the same whether or not the first call comes from within autocast."""
        if self._rows is None:
            with torch.autocast(family.device.type, enabled=False):
                self._rows = family.encode([prompt])
        self._rows = {name: value.to(family.device) for name, value in self._rows.items()}
        return {name: value.expand(n, *value.shape[1:]) for name, value in self._rows.items()}


@contextlib.contextmanager
def without_float16(device: torch.device) -> Iterator[None]:
    """No float16 inside: SDXL's autoencoder and T5's feed-forward layers leave its range (65,504) and give NaN.

    bfloat16 has float32's range and is left alone.
    """
    kind = device.type
    half = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    with torch.autocast(kind, enabled=False) if half else contextlib.nullcontext():
        yield


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pictures or videos of latents in the autoencoder's own scale, never computed in float16."""
    if vae.dtype is torch.float16:
        raise ValueError("the autoencoder's weights are float16, in which SDXL's overflows; load it as float32")
    with without_float16(latents.device):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]  # type: ignore[no-any-return]


def explicit_attention(network: Any) -> Any:
    """On CPUs, attention as plain matrix products: the backward pass of fused attention takes a third of a step there.

    Where there is a GPU fused attention stays, without which the maps of 1024 × 1024 pixels do not fit; and so it does
    on the meta device, where large models are planned.
    """
    weightless = any(p.is_meta for p in network.parameters())
    if torch.cuda.is_available() or weightless:
        return network
    attentions = [module for module in network.modules() if hasattr(module, "set_processor")]
    if any(hasattr(module.processor, "_attention_backend") for module in attentions):
        network.set_attention_backend("_native_math")
    else:
        for module in attentions:
            module.set_processor(AttnProcessor())
    return network


def same_precision(network: Any) -> Any:
    """Give norms of queries and keys their input in the precision of their weights.

    Under autocast the input is bfloat16 and the weights are float32, a pair for which torch has no fused kernel and
    warns.
    """
    for module in network.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(_as_weight)
    return network


def _as_weight(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = norm.weight
    return (inputs[0].to(weight.dtype) if isinstance(weight, Tensor) else inputs[0],)


def check_size(size: Sequence[int], multiple: int, what: str) -> None:
    """Raise ValueError where width or height in pixels is not a multiple of what the network can cut."""
    wrong = [side for side in size if side < multiple or side % multiple]
    if wrong:
        raise ValueError(f"size has {wrong[0]}; {what} takes multiples of {multiple} pixels")


def scene_preview(family: Any) -> tuple[tuple[float, float, float], ...]:
    """The linear map from a family's latents to colours, fitted on held-out scenes.

    Latents are as local in large pictures as in small ones, so those of large models are fitted on 128 pixels.
    """
    side = min(family.size)
    side, count = (side, 256) if side <= 64 else (128, 16)
    images = to_float(scene_images(HELD_OUT_SEED, count, side)[:128])
    latents = family.encode_images(images.to(family.device))
    return preview_matrix(latents.squeeze(2).cpu() if latents.ndim == 5 else latents.cpu(), images)
