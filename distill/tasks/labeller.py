"""Training of the labeller on exact labels of all attribute combinations, the held-out ones included.

python -m distill.run recipes/scenes-labeller.yaml
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from distill.config import LabellerRecipe
from distill.data.cache import HELD_OUT_SEED, scene_images
from distill.data.scenes import project
from distill.data.world import Scene, sample_scene
from distill.labeller import ATTRIBUTES, STRIDE, Detection, Labeller
from distill.parallel.device import device, moved
from distill.tasks.common import autocast, batch_indices, to_float
from distill.trainer import Phase, Telemetry, generator

_HELD_OUT_COMBINATIONS_SEED = 2
_HELD_OUT_SHARE = 5
"""One picture in five shows a combination that the generators never see in training."""


def targets(scenes: list[Scene], size: int) -> dict[str, Tensor]:
    """Labels of the cells that hold a thing's centre: their indices, attributes and positions, one row per thing."""
    side = size // STRIDE
    rows = []
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            u, v = project(thing)
            cell = (min(side - 1, max(0, int(v * side))), min(side - 1, max(0, int(u * side))))
            values = [names.index(getattr(thing, name)) for name, names in ATTRIBUTES]
            rows.append((b, *cell, *values, thing.x, thing.z))
    table = torch.tensor(rows, dtype=torch.float64)
    return {"cells": table[:, :3].long(), "attributes": table[:, 3:7].long(), "position": table[:, 7:].float()}


def matches(scene: Scene, found: list[Detection]) -> bool:
    """Whether the detections are exactly the scene's things, by their attributes."""
    expected = sorted((t.shape, t.colour, t.size, t.material) for t in scene.things)
    return expected == sorted((d.shape, d.colour, d.size, d.material) for d in found)


class LabellerTask:
    """Objectness at the centres' cells, cross-entropy of the attributes and L1 of the positions there."""

    def __init__(self, recipe: LabellerRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.labeller = Labeller(recipe.width).train().to(device())
        self.roles: dict[str, nn.Module] = {"labeller": self.labeller}
        self.optimizers = {"labeller": recipe.optimizer}
        data = recipe.data
        self.images = scene_images(data.seed, data.count, data.size)
        self.rare_count = min(data.count, 10_000)
        self.rare = scene_images(_HELD_OUT_COMBINATIONS_SEED, self.rare_count, data.size, "held_out")

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("labeller", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count)
        rare = index[: len(index) // _HELD_OUT_SHARE] % self.rare_count
        common = index[len(rare) :]
        pixels = to_float(np.concatenate((self.rare[rare], self.images[common])))
        scenes = [sample_scene(_HELD_OUT_COMBINATIONS_SEED, int(i), combinations="held_out") for i in rare]
        scenes += [sample_scene(r.data.seed, int(i)) for i in common]
        noise = generator(r.seed, iteration, micro, "noise")
        strength = 0.06 * torch.rand(len(pixels), 1, 1, 1, generator=noise)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=noise)
        with autocast(r.precision):
            out = {name: value.float() for name, value in self.labeller(moved(pixels, device())).items()}
        return self._compare(out, {k: moved(v, device()) for k, v in targets(scenes, r.data.size).items()})

    def _compare(self, out: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[Tensor, Telemetry]:
        b, row, column = truth["cells"].unbind(1)
        present = torch.zeros_like(out["object"])
        present[b, 0, row, column] = 1.0
        loss = 20 * binary_cross_entropy_with_logits(out["object"], present)
        values: dict[str, Tensor | float] = {"object": loss.detach()}
        for i, (name, _) in enumerate(ATTRIBUTES):
            logits = out[name][b, :, row, column]
            loss = loss + cross_entropy(logits, truth["attributes"][:, i])
            values[f"{name}/accuracy"] = (logits.argmax(1) == truth["attributes"][:, i]).float().mean()
        position = (out["position"][b, :, row, column] - truth["position"]).abs().mean()
        return loss + position, values | {"position": position.detach()}

    def preview(self) -> Tensor:
        return torch.from_numpy(np.array(self.images[:16]))

    def finish(self, output: Path) -> None:
        """Measure exact-scene accuracy on held-out renders of both kinds of combinations, then save."""
        accuracy = {}
        for combinations in ("trained", "held_out"):
            count = 1000
            images = scene_images(HELD_OUT_SEED, count, self.recipe.data.size, combinations)
            scenes = [sample_scene(HELD_OUT_SEED, i, combinations=combinations) for i in range(count)]
            found = self.labeller.detect(torch.from_numpy(np.array(images)).to(device()))
            accuracy[combinations] = sum(matches(s, d) for s, d in zip(scenes, found, strict=True)) / count
        print(f"whole scenes labelled right: {accuracy}")
        self.labeller.save(output, accuracy)
