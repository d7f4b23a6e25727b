"""Rewards of the embedded worlds: a CLIPModel tuned on preferences, in HPSv2's form, and a classifier of digits.

python -m distill.run recipes/scenes-reward.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, logsigmoid, pad
from transformers import CLIPModel, CLIPTokenizer

from distill.config import RewardRecipe
from distill.data.cache import HELD_OUT_SEED, scene_images
from distill.data.captions import describe
from distill.data.digits import load_digits
from distill.data.world import sample_scene
from distill.parallel.device import device, moved
from distill.rewards import ClipReward, DigitClassifier, image_features, text_features
from distill.tasks.clip import wrong_caption
from distill.tasks.common import autocast, batch_indices, save_half, to_float, to_uint8
from distill.trainer import Phase, Telemetry, generator, seeded


def degrade(images: Tensor, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """Each picture damaged in one way that few-step generators know: (B, 3, H, W) in [−1, 1], same shape.

    Blur, noise, wrong saturation, a ghost of the next picture, coarse pixels or lost contrast, each by a random amount.
    """
    out = []
    ghosts = images.roll(1, 0)
    for image, ghost in zip(images, ghosts, strict=True):
        amount, kind = float(rng.uniform(0.15, 1.0)), int(rng.integers(6))
        gray = image.mean(0, keepdim=True)
        if kind == 0:
            width = 1 + 2 * round(1 + 2 * amount)
            damaged = avg_pool2d(pad(image[None], (width // 2,) * 4, mode="replicate"), width, 1)[0]
        elif kind == 1:
            damaged = image + 0.35 * amount * torch.randn(image.shape, generator=noise)
        elif kind == 2:
            factor = 1 - amount if rng.random() < 0.5 else 1 + 1.5 * amount
            damaged = gray + factor * (image - gray)
        elif kind == 3:
            damaged = (1 - 0.5 * amount) * image + 0.5 * amount * ghost
        elif kind == 4:
            side = max(8, round(image.shape[-1] * (0.6 - 0.4 * amount)))
            small = interpolate(image[None], (side, side), mode="area")
            damaged = interpolate(small, image.shape[-2:], mode="bilinear")[0]
        else:
            damaged = image.mean() + (1 - 0.8 * amount) * (image - image.mean())
        out.append(damaged.clamp(-1, 1))
    return torch.stack(out)


class ClipRewardTask:
    """Bradley–Terry on 100 × cosine: the clean picture with its caption beats a damaged one and a wrong caption."""

    def __init__(self, recipe: RewardRecipe) -> None:
        self.recipe = recipe
        start = Path(recipe.clip or "")
        self.tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
        self.clip = CLIPModel.from_pretrained(start, attn_implementation="eager", dtype=torch.float32).train()
        self.clip.to(device())
        self.clip.logit_scale.requires_grad_(False)
        self.roles: dict[str, nn.Module] = {"reward": self.clip}
        self.optimizers = {"reward": recipe.optimizer}
        data: Any = recipe.data
        self.images = scene_images(data.seed, data.count, data.size)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("reward", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        data: Any = r.data
        index = np.sort(batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, data.count))
        rng = seeded(r.seed, iteration, micro, "captions")
        scenes = [sample_scene(data.seed, int(i)) for i in index]
        clean = to_float(self.images[index])
        damaged = degrade(clean, rng, generator(r.seed, iteration, micro, "noise"))
        texts = [describe(s, rng, full=True).text for s in scenes]
        texts += [wrong_caption(s, rng).text for _ in range(r.wrong_captions) for s in scenes]
        with autocast(r.precision):
            pictures = image_features(self.clip, moved(torch.cat((clean, damaged)), device()))
            captions = text_features(self.clip, self.tokenizer, texts)
        shown, spoiled = pictures.chunk(2)
        right, wrong = captions[: len(scenes)], captions[len(scenes) :].unflatten(0, (r.wrong_captions, len(scenes)))
        good = (shown * right).sum(-1)
        over_damaged = 100.0 * (good - (spoiled * right).sum(-1)) / r.temperature
        over_wrong = 100.0 * (good - (shown * wrong).sum(-1)) / r.temperature
        loss = -logsigmoid(over_damaged).mean() - logsigmoid(over_wrong).mean()
        values = {"over_damaged": (over_damaged > 0).float().mean(), "over_wrong": (over_wrong > 0).float().mean()}
        return loss, values

    def preview(self) -> Tensor:
        clean = to_float(self.images[:16])
        return to_uint8(degrade(clean, seeded(0, "preview"), generator(0, "preview")))

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        """Measure both preferences on held-out scenes, then save."""
        count, rng = 512, seeded(self.recipe.seed, "pairs")
        scenes = [sample_scene(HELD_OUT_SEED, i) for i in range(count)]
        data: Any = self.recipe.data
        clean = torch.from_numpy(np.array(scene_images(HELD_OUT_SEED, count, data.size)))
        damaged = to_uint8(degrade(to_float(clean), rng, generator(self.recipe.seed, "pairs")))
        right = [describe(s, rng, full=True).text for s in scenes]
        wrong = [wrong_caption(s, rng).text for s in scenes]
        reward = ClipReward(self.clip, self.tokenizer, output.name)
        good = reward.score(clean, right)
        over_damaged = float((good > reward.score(damaged, right)).float().mean())
        over_wrong = float((good > reward.score(clean, wrong)).float().mean())
        print(f"prefers the clean picture in {100 * over_damaged:.1f} %, the right caption in {100 * over_wrong:.1f} %")
        save_half(self.clip, output)
        self.tokenizer.save_pretrained(output / "tokenizer")


class DigitRewardTask:
    """Cross-entropy of a classifier on digits with a little noise; the reward is the label's log-probability."""

    def __init__(self, recipe: RewardRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.classifier = DigitClassifier().train().to(device())
        self.roles: dict[str, nn.Module] = {"reward": self.classifier}
        self.optimizers = {"reward": recipe.optimizer}
        images, labels = load_digits("train")
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("reward", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = torch.from_numpy(
            batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, len(self.labels))
        )
        noise = torch.randn(len(index), 1, 8, 8, generator=generator(r.seed, iteration, micro, "noise"))
        labels = moved(self.labels[index], device())
        logits = self.classifier(moved(to_uint8(self.images[index] + 0.15 * noise), device()))
        accuracy = (logits.argmax(1) == labels).float().mean()
        return cross_entropy(logits, labels, label_smoothing=0.05), {"accuracy": accuracy}

    def preview(self) -> Tensor:
        return to_uint8(self.images[:40])

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        images, labels = load_digits("held_out")
        answers = self.classifier(to_uint8(torch.from_numpy(images)).to(device())).argmax(1).cpu()
        accuracy = float((answers == torch.from_numpy(labels)).float().mean())
        print(f"accuracy on {len(labels)} held-out digits: {100 * accuracy:.1f} %")
        self.classifier.save(output, accuracy)


def reward_task(recipe: RewardRecipe) -> ClipRewardTask | DigitRewardTask:
    """The task of a reward recipe."""
    return DigitRewardTask(recipe) if recipe.data == "digits" else ClipRewardTask(recipe)
