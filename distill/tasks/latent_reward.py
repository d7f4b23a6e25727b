"""A reward of latents: what a reward of pictures says of a picture, learned from the latents that hold it.

    python -m distill.run recipes/scenes-latent-reward.yaml

Scenes and damaged scenes are encoded; what is imitated is the reward of what the autoencoder makes of these latents, as
AMD would see it, and not of the picture before. The damages are those that the reward itself was tuned with, so that
poor samples are as well known as clean ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from distill.config import LatentRewardRecipe, RecipeError
from distill.data.cache import HELD_OUT_SEED, WORLD_VERSION, cached_array, scene_images
from distill.data.captions import describe
from distill.data.world import sample_scene
from distill.families.parts import decoded
from distill.parallel.device import device, moved
from distill.rewards import ClipReward, image_features, load_reward
from distill.rewards.latent import LatentReward, latent_clip
from distill.tasks.clip import wrong_caption
from distill.tasks.common import autocast, batch_indices, freeze, to_float, to_uint8
from distill.tasks.reward import degrade
from distill.trainer import Phase, Telemetry, generator, seeded

VERSIONS = 4
"""Of a scene: as it is, and damaged in three ways."""
_CHUNK = 32


class LatentRewardTask:
    """1 − cosine of both image embeddings; before that the new convolutions alone learn the old patch embedding."""

    def __init__(self, recipe: LatentRewardRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.reward = _imitable(recipe.reward).to(device())
        self.vae = _autoencoder(recipe.vae).to(device())
        side = recipe.data.size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.shape = (int(self.vae.config.latent_channels), side, side)
        self.clip = latent_clip(self.reward.clip, self.shape, recipe.width).train()
        self.clip.requires_grad_(False)
        for trained in (self.clip.vision_model, self.clip.visual_projection):
            trained.requires_grad_(True)
        self.roles: dict[str, nn.Module] = {"reward": self.clip.to(device())}
        self.optimizers = {"reward": recipe.optimizer}
        self.latents, self.pictures = self._prepared(recipe.data.seed, recipe.data.count)

    def _prepared(self, seed: int, count: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """Latents (count, VERSIONS, C, h, w) float16 in model scale of scenes, and what they show, uint8; on disk."""
        size = self.recipe.data.size
        images = scene_images(seed, count, size)
        weights = b"".join(v.float().cpu().numpy().tobytes() for v in self.vae.state_dict().values())
        name = f"{seed}-{count}-{size}-v{WORLD_VERSION}-{self.recipe.seed}-{hashlib.sha256(weights).hexdigest()[:10]}"

        def encode(start: int, stop: int) -> NDArray[np.generic]:
            rng, noise = seeded(self.recipe.seed, start, "damages"), generator(self.recipe.seed, start, "damages")
            clean = to_float(images[start:stop])
            versions = torch.stack([clean, *(degrade(clean, rng, noise) for _ in range(VERSIONS - 1))], 1)
            z: NDArray[np.generic] = self._encode(versions.flatten(0, 1)).unflatten(0, (-1, VERSIONS)).half().numpy()
            return z

        latents = cached_array(f"damaged-latents-{name}", (count, VERSIONS, *self.shape), np.float16, encode, _CHUNK)

        def decode(start: int, stop: int) -> NDArray[np.generic]:
            z = torch.from_numpy(np.array(latents[start:stop])).float()
            shown: NDArray[np.generic] = self._decode(z.flatten(0, 1)).unflatten(0, (-1, VERSIONS)).numpy()
            return shown

        seen = (count, VERSIONS, 3, size, size)
        return latents, cached_array(f"damaged-pictures-{name}", seen, np.uint8, decode, _CHUNK)

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> Tensor:
        """Float pictures to latents in model scale, on the host."""
        config = self.vae.config
        with autocast(self.recipe.precision):
            z: Tensor = self.vae.encode(moved(pictures, device())).latent_dist.mode()
        return (z.float().cpu() - (config.shift_factor or 0.0)) * float(config.scaling_factor)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Latents in model scale to uint8 pictures, on the host."""
        config = self.vae.config
        with autocast(self.recipe.precision):
            pictures = decoded(
                self.vae, moved(latents, device()) / config.scaling_factor + (config.shift_factor or 0.0)
            )
        return to_uint8(pictures).cpu()

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("reward", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = np.sort(batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count))
        latents = moved(torch.from_numpy(np.array(self.latents[index])), device()).float().flatten(0, 1)
        pictures = moved(torch.from_numpy(np.array(self.pictures[index])), device()).flatten(0, 1)
        with autocast(r.precision):
            pixels = self.reward.prepare(to_float(pictures))
            if iteration < r.stem_iterations:
                return self._stem_loss(latents, pixels)
            with torch.no_grad():
                goal = image_features(self.reward.clip, pixels)
            cosine = (image_features(self.clip, latents) * goal).sum(-1).mean()
        return 1.0 - cosine, {"cosine": cosine.detach()}

    def _stem_loss(self, latents: Tensor, pixels: Tensor) -> tuple[Tensor, Telemetry]:
        """Mean square error of patches in units of their variance."""
        with torch.no_grad():
            goal = self.reward.clip.vision_model.embeddings.patch_embedding(pixels).float()
        stem = self.clip.vision_model.embeddings.patch_embedding
        loss = mse_loss(stem(latents).float(), goal) / goal.var()
        return loss, {"stem_error": loss.detach()}

    def preview(self) -> Tensor:
        return torch.from_numpy(np.array(self.pictures[:8])).flatten(0, 1)

    @torch.no_grad()
    def finish(self, output: Path) -> None:
        """Compare both rewards on held-out scenes, then save."""
        reward = LatentReward(
            self.clip,
            self.reward.tokenizer,
            output.name,
            factor=self.reward.factor,
            scale=self.vae.config.scaling_factor,
            imitates=self.reward.digest,
        )
        accuracy = self._agreement(reward)
        print(
            f"as {self.reward.name} on held-out scenes: correlation {accuracy['between']:.3f} between prompts, "
            f"{accuracy['within']:.3f} within; the right caption wins in {100 * accuracy['over_wrong']:.1f} %, with "
            f"{self.reward.name} in {100 * accuracy['over_wrong_imitated']:.1f} %"
        )
        reward.save(output, accuracy)

    def _agreement(self, reward: LatentReward) -> dict[str, float]:
        """Correlations of both rewards over versions of a scene and over scenes, and how often each reads it right."""
        count, rng = min(256, self.recipe.data.count), seeded(self.recipe.seed, "pairs")
        latents, pictures = self._prepared(HELD_OUT_SEED, count)
        scenes = [sample_scene(HELD_OUT_SEED, i) for i in range(count)]
        right = [describe(scene, rng, full=True).text for scene in scenes]
        wrong = [wrong_caption(scene, rng).text for scene in scenes]
        each = [caption for caption in right for _ in range(VERSIONS)]
        groups, over_wrong = [], []
        for score, seen in ((reward.score_latents, latents.astype(np.float32)), (self.reward.score, pictures)):
            groups.append(_in_parts(score, np.concatenate(seen), each).reshape(count, VERSIONS))
            beaten = groups[-1][:, 0] > _in_parts(score, seen[:, 0], wrong)
            over_wrong.append(float(beaten.float().mean()))
        return {
            "between": _correlation(*(g.mean(1) for g in groups)),
            "within": _correlation(*(g - g.mean(1, keepdim=True) for g in groups)),
            "over_wrong": over_wrong[0],
            "over_wrong_imitated": over_wrong[1],
        }


def _in_parts(score: Callable[[Tensor, list[str]], Tensor], seen: NDArray[np.generic], captions: list[str]) -> Tensor:
    """Scores (N,) of latents or pictures (N, …), on the host."""
    parts = (slice(i, i + 4 * _CHUNK) for i in range(0, len(captions), 4 * _CHUNK))
    return torch.cat([score(torch.from_numpy(np.array(seen[p])).to(device()), captions[p]).cpu() for p in parts])


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all elements."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


def _imitable(name: str) -> ClipReward:
    """The reward that a recipe names. Raises RecipeError for one that is no CLIP-like reward of pictures."""
    reward = load_reward(name)
    if not isinstance(reward, ClipReward):
        raise RecipeError(
            f"reward: {name} is a {type(reward).__name__}, and a reward of latents imitates a CLIPModel's; give one, "
            "such as models/scenes-reward"
        )
    return reward


def _autoencoder(folder: str) -> Any:
    """The frozen AutoencoderKL in a folder. Raises RecipeError where there is none."""
    try:
        return freeze(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"vae: {folder} holds no AutoencoderKL ({first}); give the folder of one, such as bundles/scenes-sdxl/vae"
        ) from None
