"""scenes-clip: transformers' CLIPModel on rendered scenes and their captions, with two text towers as SDXL has.

Beside the contrastive loss, linear heads that are thrown away later read the facts from what others will use: from
both text towers' penultimate states and the pooled text, which guide the UNet, and from the image tower.

    python -m distill.run recipes/scenes-clip.yaml

The output folder holds the CLIPModel itself (image tower: the feature extractor of the embedded FID), the tokenizer,
and SDXL's two encoders: text_encoder (CLIPTextModel, the small tower) and text_encoder_2 (CLIPTextModelWithProjection).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from distill.config import ClipRecipe, ClipTower
from distill.data.cache import HELD_OUT_SEED, scene_images
from distill.data.captions import Caption, describe, true_of
from distill.data.tokenizer import build_tokenizer
from distill.data.world import COLOURS, MATERIALS, SHAPES, SIZES, Scene, sample_scene
from distill.parallel.device import device, moved
from distill.tasks.common import autocast, batch_indices, save_half, to_float
from distill.tasks.facts import FactsHead, caption_facts, facts_loss, scene_facts
from distill.trainer import Phase, Telemetry, seeded

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""CLIP's image normalisation for scenes: pixels enter in [−1, 1]."""


def wrong_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A full caption that is false of the scene, but true of one that differs from it in one fact."""
    while True:
        caption = describe(_changed(scene, rng), rng, full=True)
        if not true_of(caption, scene):
            return caption


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another value of one thing's attribute, or with two different things in each other's place."""
    things = list(scene.things)
    if len(things) > 1 and rng.random() < 0.4:
        i, j = rng.choice(len(things), 2, replace=False)
        if things[i].attributes != things[j].attributes:
            a, b = things[i], things[j]
            things[i], things[j] = replace(a, x=b.x, z=b.z), replace(b, x=a.x, z=a.z)
            return replace(scene, things=tuple(things))
    i = int(rng.integers(len(things)))
    field, values = [("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("material", MATERIALS)][rng.integers(4)]
    others = [value for value in values if value != getattr(things[i], field)]
    change: dict[str, Any] = {field: others[rng.integers(len(others))]}
    things[i] = replace(things[i], **change)
    return replace(scene, things=tuple(things))


def tower(settings: ClipTower, tokenizer: CLIPTokenizer, projection: int) -> dict[str, Any]:
    """Arguments of a CLIPTextConfig."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "projection_dim": projection,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "eager",
    }


class ClipTask:
    """Symmetric contrastive loss for both text towers; wrong captions join each row of the picture-to-text softmax.

    The facts are read at each caption's first end token, where CLIP pools.
    """

    def __init__(self, recipe: ClipRecipe) -> None:
        self.recipe = recipe
        output = Path(recipe.output)
        build_tokenizer(output / "tokenizer", recipe.max_tokens)
        self.tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
        torch.manual_seed(recipe.seed)
        vision = {
            "hidden_size": recipe.vision.width,
            "intermediate_size": 4 * recipe.vision.width,
            "num_hidden_layers": recipe.vision.layers,
            "num_attention_heads": recipe.vision.heads,
            "image_size": recipe.data.size,
            "patch_size": recipe.patch,
            "projection_dim": recipe.projection,
        }
        text = tower(recipe.text, self.tokenizer, recipe.projection)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.projection)
        config._attn_implementation = "eager"
        self.clip = CLIPModel(config).train()
        small = CLIPTextConfig(**tower(recipe.text_small, self.tokenizer, recipe.projection))
        self.small = CLIPTextModelWithProjection(small).train()
        widths = {
            "image": recipe.vision.width,
            "big": recipe.text.width,
            "small": recipe.text_small.width,
            "pooled": recipe.projection,
        }
        self.heads = nn.ModuleDict({name: FactsHead(width) for name, width in widths.items()})
        parts = {"clip": self.clip, "small": self.small, "heads": self.heads}
        self.roles: dict[str, nn.Module] = {"clip": nn.ModuleDict(parts).to(device())}
        self.optimizers = {"clip": recipe.optimizer}
        self.images = scene_images(recipe.data.seed, recipe.data.count, recipe.data.size)

    def tokens(self, texts: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return moved(ids, device())

    def phases(self, iteration: int) -> list[Phase]:
        return [Phase("clip", lambda micro: self._loss(iteration, micro))]

    def _loss(self, iteration: int, micro: int) -> tuple[Tensor, Telemetry]:
        r = self.recipe
        index = np.sort(batch_indices(r.seed, iteration, micro, r.batch_size // r.accumulate, r.data.count))
        rng = seeded(r.seed, iteration, micro, "captions")
        scenes = [sample_scene(r.data.seed, int(i)) for i in index]
        captions = [describe(s, rng, full=bool(rng.random() < 0.5)) for s in scenes]
        for _ in range(r.hard_negatives):
            captions += [wrong_caption(s, rng) for s in scenes]
        ids = self.tokens([caption.text for caption in captions])
        pixels = moved(to_float(self.images[index]), device())
        with autocast(r.precision):
            seen = self.clip.vision_model(pixel_values=pixels).pooler_output
            big = self.clip.text_model(input_ids=ids, output_hidden_states=True)
            small = self.small(input_ids=ids, output_hidden_states=True)
            image = self.clip.visual_projection(seen)
            embeds = {"big": self.clip.text_projection(big.pooler_output), "small": small.text_embeds}
            end = (ids == self.tokenizer.eos_token_id).int().argmax(1)
            row = torch.arange(len(ids), device=ids.device)
            states = {"big": big.hidden_states[-2][row, end], "small": small.hidden_states[-2][row, end]}
            states |= {"pooled": embeds["big"], "image": seen}
            read = {name: head(states[name]) for name, head in self.heads.items()}
        stated = moved(torch.tensor([caption_facts(caption) for caption in captions]), device())
        shown = moved(torch.tensor([scene_facts(scene) for scene in scenes]), device())
        loss, values = self._contrast(image, embeds)
        for name, logits in read.items():
            facts, values[f"{name}/facts"] = facts_loss(logits, shown if name == "image" else stated)
            loss = loss + r.facts_weight * facts
        return loss, values

    def _contrast(self, image: Tensor, embeds: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        image = normalize(image.float(), dim=-1)
        scale = self.clip.logit_scale.exp().clamp_max(100.0)
        target = torch.arange(len(image), device=image.device)
        loss = torch.zeros((), device=image.device)
        values: dict[str, Tensor | float] = {"scale": scale.detach()}
        for name, text in embeds.items():
            logits = scale * image @ normalize(text.float(), dim=-1).T
            loss = loss + 0.5 * cross_entropy(logits, target) + 0.5 * cross_entropy(logits[:, : len(image)].T, target)
            values[f"{name}/accuracy"] = (logits.argmax(1) == target).float().mean()
        return loss, values

    def preview(self) -> Tensor:
        return torch.from_numpy(np.array(self.images[:16]))

    @torch.no_grad()
    def pair_accuracy(self, count: int = 512) -> float:
        """How often a held-out picture prefers its own full caption to one with a single wrong fact."""
        rng = seeded(self.recipe.seed, "pairs")
        scenes = [sample_scene(HELD_OUT_SEED, i) for i in range(count)]
        pixels = to_float(scene_images(HELD_OUT_SEED, count, self.recipe.data.size)).to(device())
        image = normalize(
            self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output), dim=-1
        )
        scores = []
        right = [describe(s, rng, full=True) for s in scenes]
        for captions in (right, [wrong_caption(s, rng) for s in scenes]):
            ids = self.tokens([caption.text for caption in captions])
            text = normalize(self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output), dim=-1)
            scores.append((image * text).sum(1))
        return float((scores[0] > scores[1]).float().mean())

    def finish(self, output: Path) -> None:
        print(f"prefers the right caption to one with a wrong fact in {100 * self.pair_accuracy():.1f} % of scenes")
        save_half(self.clip, output)
        small = CLIPTextModel(self.small.config)
        body = {k: v for k, v in self.small.state_dict().items() if k.startswith("text_model.")}
        small.load_state_dict({k.removeprefix("text_model."): v for k, v in body.items()})
        save_half(small, output / "text_encoder")
        big = CLIPTextModelWithProjection(self.clip.config.text_config)
        state = {k: v for k, v in self.clip.state_dict().items() if k.startswith(("text_model.", "text_projection."))}
        big.load_state_dict(state)
        save_half(big, output / "text_encoder_2")
