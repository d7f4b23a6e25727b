"""The reward of the embedded video world: clean clips against damaged ones, right captions against wrong ones.

python -m distill.run recipes/scenes-video-reward.yaml
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, logsigmoid, pad
from transformers import AutoTokenizer, UMT5EncoderModel

from distill.config import VideoRewardRecipe
from distill.data.cache import HELD_OUT_SEED, scene_clips
from distill.data.captions import Caption, describe
from distill.data.world import CAMERA_MOTIONS, MOTIONS, Scene, sample_scene
from distill.motion import ClipTrunk
from distill.parallel.device import device, moved
from distill.rewards.video import VideoReward, VideoTower, caption_states
from distill.tasks.clip import wrong_caption
from distill.tasks.common import autocast, batch_indices, freeze, save_half, to_float, to_uint8
from distill.tasks.facts import CLASSES, MOTION_CLASSES, FactsHead, facts_loss, scene_facts, scene_motions
from distill.tasks.video import stills
from distill.trainer import Phase, Telemetry, generator, seeded

FACTS = (*CLASSES, *MOTION_CLASSES)
P_WRONG_MOTION = 0.5


def _frozen(clip: Tensor, amount: float, rng: np.random.Generator, _: torch.Generator) -> Tensor:
    last = int(rng.integers(0, 1 + round((1 - amount) * clip.shape[1] / 2)))
    return clip[:, torch.arange(clip.shape[1]).clamp_max(last)]


def _shaken(clip: Tensor, amount: float, rng: np.random.Generator, _: torch.Generator) -> Tensor:
    reach = 1 + round(2 * amount)
    shifts = rng.integers(-reach, reach + 1, (clip.shape[1], 2)).tolist()
    return torch.stack([clip[:, i].roll((dy, dx), (1, 2)) for i, (dy, dx) in enumerate(shifts)], 1)


def _flickering(clip: Tensor, amount: float, _: np.random.Generator, noise: torch.Generator) -> Tensor:
    return clip + 0.5 * amount * torch.randn(1, clip.shape[1], 1, 1, generator=noise)


def _shuffled(clip: Tensor, amount: float, rng: np.random.Generator, _: torch.Generator) -> Tensor:
    frames = clip.shape[1]
    return clip[:, torch.from_numpy(np.argsort(np.arange(frames) + rng.normal(0, 1 + 4 * amount, frames)))]


def _blurred(clip: Tensor, amount: float, _: np.random.Generator, __: torch.Generator) -> Tensor:
    side = 1 + round(1 + 2 * amount)
    return avg_pool2d(pad(clip, (side,) * 4, mode="replicate"), 2 * side + 1, 1)


def _smeared(clip: Tensor, amount: float, _: np.random.Generator, __: torch.Generator) -> Tensor:
    trail = clip.clone()
    for i in range(1, clip.shape[1]):
        trail[:, i] = (0.3 + 0.6 * amount) * trail[:, i - 1] + (0.7 - 0.6 * amount) * clip[:, i]
    return trail


def _noisy(clip: Tensor, amount: float, _: np.random.Generator, noise: torch.Generator) -> Tensor:
    return clip + 0.35 * amount * torch.randn(clip.shape, generator=noise)


DAMAGES: dict[str, Callable[[Tensor, float, np.random.Generator, torch.Generator], Tensor]] = {
    "frozen": _frozen,
    "shaken": _shaken,
    "flickering": _flickering,
    "shuffled": _shuffled,
    "blurred": _blurred,
    "smeared": _smeared,
    "noisy": _noisy,
}
"""What few-step generators of videos do to a clip (3, F, H, W) in [−1, 1], by an amount in (0, 1]."""


def damage(clip: Tensor, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """A clip damaged in one way, by a random amount: (3, F, H, W) in [−1, 1]."""
    spoil = list(DAMAGES.values())[rng.integers(len(DAMAGES))]
    return spoil(clip, float(rng.uniform(0.2, 1.0)), rng, noise).clamp(-1, 1)


def wrong_moving_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A full caption that is false of a moving scene in what moves how, or in one fact of its things."""
    if rng.random() >= P_WRONG_MOTION:
        return wrong_caption(scene, rng)
    if scene.camera != "still":
        others = [name for name in CAMERA_MOTIONS[1:] if name != scene.camera]
        return describe(replace(scene, camera=others[rng.integers(3)]), rng, full=True)
    others = [name for name in MOTIONS[1:-1] if name != scene.motion]
    other = others[rng.integers(len(others))]
    things = tuple(t if t.motion == "still" else replace(t, motion=other, speed=0.7) for t in scene.things)
    return describe(replace(scene, things=things), rng, full=True)


class VideoRewardTask:
    """Bradley–Terry on 100 × cosine; a linear head, thrown away later, reads facts and motions from the clip."""

    def __init__(self, recipe: VideoRewardRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        folder, data = Path(recipe.text_encoder), recipe.data
        assert data.frames is not None
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = freeze(UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32)).to(device())
        grid, text = ClipTrunk.grid(data.frames, data.size), int(self.encoder.config.d_model)  # type: ignore[union-attr, arg-type]
        self.tower = VideoTower(recipe.width, recipe.layers, text, recipe.projection, grid).train()
        self.head = FactsHead(4 * recipe.width, FACTS)
        self.roles: dict[str, nn.Module] = {
            "reward": nn.ModuleDict({"tower": self.tower, "head": self.head}).to(device())
        }
        self.optimizers = {"reward": recipe.optimizer}
        self.clips = scene_clips(data.seed, data.count, data.frames, data.size)

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("reward", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count)
        rng, noise = seeded(r.seed, iteration, micro, "captions"), generator(r.seed, iteration, micro, "noise")
        scenes = [sample_scene(r.data.seed, int(i), moving=True) for i in index]
        clean = torch.stack([to_float(self.clips[i]) for i in index])
        damaged = torch.stack([damage(clip, rng, noise) for clip in clean])
        texts = [describe(scene, rng, full=True).text for scene in scenes]
        texts += [wrong_moving_caption(scene, rng).text for _ in range(r.wrong_captions) for scene in scenes]
        with autocast(r.precision):
            seen, spoiled = self.tower.see(moved(torch.cat((clean, damaged)), device())).chunk(2)
            words = self.tower.words(caption_states(self.encoder, self.tokenizer, texts))
            read = self.head(seen)
        right, wrong = words[: len(scenes)], words[len(scenes) :].unflatten(0, (r.wrong_captions, len(scenes)))
        good = (self.tower.vectors(seen) * right).sum(-1)
        over_damaged = 100.0 * (good - (self.tower.vectors(spoiled) * right).sum(-1)) / r.temperature
        over_wrong = 100.0 * (good - (self.tower.vectors(seen) * wrong).sum(-1)) / r.temperature
        shown = torch.tensor([[*scene_facts(scene), *scene_motions(scene)] for scene in scenes])
        facts, known = facts_loss(read, moved(shown, device()), FACTS)
        loss = -logsigmoid(over_damaged).mean() - logsigmoid(over_wrong).mean() + r.facts_weight * facts
        values = {"over_damaged": (over_damaged > 0).float().mean(), "over_wrong": (over_wrong > 0).float().mean()}
        return loss, {**values, "facts": known}

    def preview(self) -> Tensor:
        rng, noise = seeded(0, "preview"), generator(0, "preview")
        return stills(to_uint8(torch.stack([damage(to_float(clip), rng, noise) for clip in self.clips[:16]])))

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        """Measure both preferences on held-out clips, then save."""
        data, rng = self.recipe.data, seeded(self.recipe.seed, "pairs")
        assert data.frames is not None
        count, noise = min(256, data.count), generator(self.recipe.seed, "pairs")
        scenes = [sample_scene(HELD_OUT_SEED, i, moving=True) for i in range(count)]
        clean = to_float(scene_clips(HELD_OUT_SEED, count, data.frames, data.size))
        damaged = torch.stack([damage(clip, rng, noise) for clip in clean])
        right = [describe(scene, rng, full=True).text for scene in scenes]
        wrong = [wrong_moving_caption(scene, rng).text for scene in scenes]
        reward = VideoReward(self.tower, self.encoder, self.tokenizer, output.name)

        def score(clips: Tensor, captions: list[str]) -> Tensor:
            parts = range(0, count, 32)
            return torch.cat(
                [reward.score(to_uint8(clips[i : i + 32]).to(device()), captions[i : i + 32]) for i in parts]
            )

        good = score(clean, right)
        accuracy = {
            "over_damaged": float((good > score(damaged, right)).float().mean()),
            "over_wrong": float((good > score(clean, wrong)).float().mean()),
        }
        print(f"held-out preferences right: {accuracy}")
        reward.save(output, accuracy)
        save_half(self.encoder, output / "text_encoder")
        self.tokenizer.save_pretrained(output / "text_encoder" / "tokenizer")
