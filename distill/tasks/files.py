"""Samples from somebody's own files: prompts alone, or pictures with captions or labels for what learns from them.

    data: {prompts: prompts.txt}                                        # most students need no pictures
    data: {prompts: prompts.txt, pictures: "/data/laion/*.tar"}         # a GAN's real pictures have their own captions
    data: {pictures: /data/imagenet/train}                              # labels from subfolders

Latents of pictures are computed when they are first drawn and kept on disk, and so are the text encoders' states with
``cache_text``; both are known by content (distill.data.rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.config import FileData, RecipeError
from distill.data.pictures import cut, decode, open_pictures
from distill.data.prompts import read_prompts
from distill.data.rows import RowCache, content_digest
from distill.families.base import Condition
from distill.tasks.common import batch_indices, to_float

PREVIEWS = 8


class FileSamples:
    """Uniform draws with replacement from files, functions of (seed, iteration, micro)."""

    def __init__(self, data: FileData, seed: int, family: Any) -> None:
        self.data, self.seed, self.family = data, seed, family
        self.pictures = open_pictures(data.pictures, data.caption_key) if data.pictures else None
        self.prompts = read_prompts(data.prompts, data.prompt_key) if data.prompts else None
        self._latents: LatentCache | None = None
        if data.cache_text and self.prompts is not None:
            family.encode = CachedText(family, self.prompts)

    def conditions(self, iteration: int, micro: int, size: int) -> list[Any]:
        return [self._condition(int(i)) for i in self._index(iteration, micro, size, self._count())]

    def batch(self, iteration: int, micro: int, size: int) -> tuple[Tensor, list[Any]]:
        if self.pictures is None:
            raise ValueError("data has prompts alone, and this recipe learns from pictures; name data.pictures")
        if self._latents is None:
            self._latents = LatentCache(self.family, self.pictures)
        index = self._index(iteration, micro, size, len(self.pictures))
        return self._latents.rows(index), [self.pictures.condition(int(i)) for i in index]

    def preview_conditions(self) -> list[Any]:
        """Eight of them, spread over the files."""
        count = self._count()
        shown = min(PREVIEWS, count)
        return [self._condition(i * count // shown) for i in range(shown)]

    def _count(self) -> int:
        return len(self.prompts if self.prompts is not None else self.pictures or ())

    def _condition(self, index: int) -> Any:
        if self.prompts is not None:
            return self.prompts[index]
        assert self.pictures is not None
        return self.pictures.condition(index)

    def _index(self, iteration: int, micro: int, size: int, count: int) -> NDArray[np.int64]:
        return np.sort(batch_indices(self.seed, iteration, micro, size, count))


class LatentCache:
    """Latents of pictures at a family's size, float16 on disk, known by the bytes of the picture's file."""

    def __init__(self, family: Any, pictures: Any) -> None:
        self.family, self.pictures = family, pictures
        shape = tuple(family.latent_shape())
        if len(shape) == 4 and shape[1] != 1:
            raise RecipeError(
                f"data.pictures holds stills and this student makes videos (latents {shape}); drop what learns from "
                "pictures, or set frames: 1"
            )
        size = tuple(int(side) for side in family.size)
        self.size = (size[0], size[1])
        maker = latents_digest(family).hex()[:16]
        name = f"latents-{family.name}-{self.size[0]}x{self.size[1]}-{maker}"
        self.cache = RowCache(name, len(pictures), {"latents": (shape, "float16")})

    def rows(self, index: NDArray[np.int64]) -> Tensor:
        """(len(index), C, h, w) float32, on the CPU."""
        found = [self._row(int(i)) for i in index]
        return torch.from_numpy(np.stack(found)).float()

    def _row(self, index: int) -> NDArray[np.generic]:
        data = self.pictures.read(index)
        source = content_digest(data)
        kept = self.cache.read(index, source)
        if kept is None:
            image = cut(decode(self.pictures, index, data), self.size)
            latents = self.family.encode_images(to_float(image[None]).to(self.family.device))[0]
            kept = {"latents": latents.half().cpu().numpy()}
            if not np.isfinite(kept["latents"].astype(np.float32)).all():
                raise ValueError(f"{self.pictures.name(index)} has latents that are not finite in float16; remove it")
            self.cache.write(index, source, kept)
        return kept["latents"]


class CachedText:
    """A family's ``encode`` that reads the states of known prompts from disk, as they were computed, to the last bit.

    One prompt of SDXL takes 0.6 MB in float32, one of Wan 8 MB. Other prompts are encoded as ever.
    """

    def __init__(self, family: Any, prompts: Sequence[str]) -> None:
        self.family, self.compute = family, family.encode
        self.slots = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        first = self.compute([next(iter(self.slots))])
        self.kinds = {name: value.dtype for name, value in first.items()}
        fields = {name: (tuple(value.shape[1:]), _plain(value).dtype.str) for name, value in first.items()}
        maker = text_digest(family)
        name = f"text-{family.name}-{content_digest(maker, *self.slots).hex()[:16]}"
        self.cache, self.maker = RowCache(name, len(self.slots), fields), maker

    def __call__(self, prompts: Sequence[str]) -> Condition:
        rows = [self._kept(prompt) for prompt in prompts]
        missing = list(dict.fromkeys(p for p, row in zip(prompts, rows, strict=True) if row is None))
        if missing:
            made = self.compute(missing)
            fresh = {p: {k: _plain(v[i]) for k, v in made.items()} for i, p in enumerate(missing)}
            for prompt in fresh.keys() & self.slots.keys():
                self.cache.write(self.slots[prompt], self._source(prompt), fresh[prompt])
            rows = [fresh[p] if row is None else row for p, row in zip(prompts, rows, strict=True)]
        device = self.family.device
        return {
            name: torch.from_numpy(np.stack([row[name] for row in rows if row is not None])).to(device, kind)
            for name, kind in self.kinds.items()
        }

    def _source(self, prompt: str) -> bytes:
        return content_digest(self.maker, prompt)

    def _kept(self, prompt: str) -> dict[str, NDArray[np.generic]] | None:
        slot = self.slots.get(prompt)
        return None if slot is None else self.cache.read(slot, self._source(prompt))


def _plain(value: Tensor) -> NDArray[np.generic]:
    """numpy has no bfloat16; float32 holds it exactly."""
    array: NDArray[np.generic] = (value.float() if value.dtype is torch.bfloat16 else value).cpu().numpy()
    return array


def modules_digest(modules: dict[str, nn.Module]) -> bytes:
    """Depends on every weight of the modules."""
    return content_digest(
        *(
            content_digest(f"{name}.{key}", _plain(value).tobytes())
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        )
    )


def latents_digest(family: Any) -> bytes:
    """Depends on the autoencoder's weights and on the numbers that bring its output to model scale."""
    vae = family.parts.get("vae")
    if vae is None:
        return modules_digest({})
    scale = [
        getattr(vae.config, name, None) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    ]
    return content_digest(modules_digest({"vae": vae}), repr(scale))


def text_digest(family: Any) -> bytes:
    """Depends on all that makes a prompt's condition: encoders, tokenizers, length, FLUX's embedded guidance."""
    encoders = {name: part for name, part in family.parts.items() if name.startswith("text_encoder")}
    single = (getattr(family, name, None) for name in ("tokenizer", "tokenizer_2"))
    tokenizers = getattr(family, "tokenizers", None) or list(single)
    words = [f"{sorted(t.get_vocab().items())} {t.model_max_length} {t.padding_side}" for t in tokenizers if t]
    settings = [f"{name} {getattr(family, name, None)}" for name in ("max_tokens", "guidance")]
    return content_digest(modules_digest(encoders), *words, *settings)
