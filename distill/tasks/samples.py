"""Clean samples with their conditions, for teachers and for distillation: latents of scenes, or digits.

Both are functions of (seed, iteration, micro): nothing has a position that a resumed run could lose.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import FileData, RecipeError, SceneData
from distill.data.cache import cached_array, scene_clips, scene_images
from distill.data.captions import describe
from distill.data.world import sample_scene
from distill.tasks.common import autocast, batch_indices, to_float
from distill.tasks.files import FileSamples
from distill.trainer import seeded

PREVIEW_PROMPTS = (
    "a large red metal sphere left of a small blue rubber sphere",
    "a small green rubber cube",
    "a big shiny purple cylinder behind a small yellow ball",
    "a large gray rubber cylinder in front of a small cyan metal cube",
    "two small brown metal spheres",
    "a large yellow matte cube",
    "a small purple rubber ball right of a large cyan metal cylinder",
    "a large blue metal sphere",
)


PREVIEW_CLIPS = (
    "a large red metal sphere rolling to the left",
    "a small blue rubber cube bouncing up and down",
    "a large green cylinder and a small yellow ball circling the cylinder",
    "a large gray metal cube, as the camera zooms in",
    "a small purple rubber sphere rolling towards us",
    "a large cyan metal cube and a small brown ball, while the camera pans right",
    "a small red metal cylinder sliding right",
    "a large yellow rubber sphere rolling away from us",
)


class Samples(Protocol):
    """A source of training samples."""

    def conditions(self, iteration: int, micro: int, size: int) -> list[Any]:
        """Prompts or labels of a micro-batch."""
        ...

    def batch(self, iteration: int, micro: int, size: int) -> tuple[Tensor, list[Any]]:
        """Clean latents (size, C, h, w) in model scale, on the host, with their prompts or labels."""
        ...

    def preview_conditions(self) -> list[Any]: ...


class SceneSamples:
    """Scenes of trained combinations, still or moving; each gets a new caption each time it is drawn.

    precision: of the autoencoder, once for all latents.
    """

    def __init__(self, data: SceneData, seed: int, family: Any, precision: str = "bfloat16") -> None:
        self.data, self.seed, self.family, self.precision = data, seed, family, precision
        self._latents: NDArray[np.generic] | None = None

    def conditions(self, iteration: int, micro: int, size: int) -> list[str]:
        index = self._index(iteration, micro, size)
        share = self.data.held_out_prompts
        if not share:
            return self._captions(index, iteration, micro)
        beyond = seeded(self.seed, iteration, micro, "held-out").random(size) < share
        return self._captions(index, iteration, micro, np.where(beyond, "held_out", "trained"))

    def batch(self, iteration: int, micro: int, size: int) -> tuple[Tensor, list[str]]:
        if self._latents is None:
            self._latents = self._cache()
        index = self._index(iteration, micro, size)
        return torch.from_numpy(np.array(self._latents[index])).float(), self._captions(index, iteration, micro)

    def preview_conditions(self) -> list[str]:
        return list(PREVIEW_CLIPS if self.data.frames else PREVIEW_PROMPTS)

    def _index(self, iteration: int, micro: int, size: int) -> NDArray[np.int64]:
        return np.sort(batch_indices(self.seed, iteration, micro, size, self.data.count))

    def _captions(
        self, index: NDArray[np.int64], iteration: int, micro: int, combinations: NDArray[np.str_] | None = None
    ) -> list[str]:
        rng = seeded(self.seed, iteration, micro, "captions")
        kinds = ["trained"] * len(index) if combinations is None else combinations
        seed, moving = self.data.seed, self.data.frames is not None
        scenes = [
            sample_scene(seed, int(i), combinations=str(k), moving=moving) for i, k in zip(index, kinds, strict=True)
        ]
        return [describe(scene, rng).text for scene in scenes]

    def _cache(self) -> NDArray[np.generic]:
        data = self.data
        if data.frames:
            images = scene_clips(data.seed, data.count, data.frames, data.size)
        else:
            images = scene_images(data.seed, data.count, data.size)
        state = self.family.vae.state_dict()
        parts = [v for k, v in state.items() if not k.startswith(("decoder.", "post_quant_conv."))]
        digest = hashlib.sha256(b"".join(v.float().cpu().numpy().tobytes() for v in parts)).hexdigest()[:10]

        def fill(start: int, stop: int) -> NDArray[np.generic]:
            with autocast(self.precision):
                latents = self.family.encode_images(to_float(images[start:stop]).to(self.family.device))
            return latents.half().cpu().numpy()  # type: ignore[no-any-return]

        clip = f"-{data.frames}" if data.frames else ""
        full = "-float32" if self.precision == "float32" else ""
        name = f"latents-{data.seed}-{data.count}{clip}-{data.size}-{digest}{full}"
        shape = (data.count, *self.family.latent_shape())
        return cached_array(name, shape, np.float16, fill, chunk=8 if data.frames else 256)


class DigitSamples:
    """scikit-learn's handwritten digits of the training split, with their labels."""

    def __init__(self, seed: int) -> None:
        from distill.data.digits import load_digits

        images, labels = load_digits("train")
        self.seed, self.images, self.labels = seed, torch.from_numpy(images), labels

    def conditions(self, iteration: int, micro: int, size: int) -> list[int]:
        return self.batch(iteration, micro, size)[1]

    def batch(self, iteration: int, micro: int, size: int) -> tuple[Tensor, list[int]]:
        index = batch_indices(self.seed, iteration, micro, size, len(self.labels))
        return self.images[torch.from_numpy(index)], [int(label) for label in self.labels[index]]

    def preview_conditions(self) -> list[int]:
        return [i % 10 for i in range(40)]


class LabelSamples:
    """A family's classes, each as likely as the others; there are no pictures."""

    def __init__(self, seed: int, classes: int) -> None:
        self.seed, self.classes = seed, classes

    def conditions(self, iteration: int, micro: int, size: int) -> list[int]:
        return [int(label) for label in batch_indices(self.seed, iteration, micro, size, self.classes)]

    def batch(self, iteration: int, micro: int, size: int) -> tuple[Tensor, list[int]]:
        raise ValueError("data: labels has no pictures, which gan and the like need; name a source of pictures")

    def preview_conditions(self) -> list[int]:
        return [i * self.classes // 8 for i in range(8)]


def samples_for(data: SceneData | FileData | str, seed: int, family: Any, precision: str = "bfloat16") -> Samples:
    """The samples that a recipe names. Raises RecipeError for prompts where labels are read, or labels for prompts.

    precision: in which latents of scenes are encoded; processors without bfloat16 take fifty times as long for it.
    """
    reads_labels, gives_labels = hasattr(family, "classes"), data in ("labels", "digits")
    if gives_labels and not reads_labels:
        raise RecipeError(f"data is {data}, and the {family.name} family reads prompts; name data.prompts")
    pictures_alone = isinstance(data, FileData) and data.prompts is None
    if reads_labels and not gives_labels and not pictures_alone:
        raise RecipeError(f"data has prompts, and the {family.name} family reads labels; use data: labels, or pictures")
    if isinstance(data, FileData):
        return FileSamples(data, seed, family)
    if data == "labels":
        return LabelSamples(seed, family.classes)
    if data == "digits":
        return DigitSamples(seed)
    assert isinstance(data, SceneData)
    return SceneSamples(data, seed, family, precision)
