"""Networks of the published architectures with random weights, on the device at once: speed does not depend on them.

    teacher, judge = Untrained(folder).teacher, Untrained(folder).judge      # for DistillationTask

Prompts are read by small tokenizers of the same lengths. A reward whose architecture is not made here is stood in for
by HPSv2's ViT-H/14, and said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2ForImageClassification

from distill.config import DistillRecipe
from distill.data.tokenizer import build_tokenizer
from distill.families.load import FAMILIES, Teacher, options_for, with_grid
from distill.families.published import configs_of
from distill.parallel.device import device
from distill.reward_names import parse_reward
from distill.rewards.clip import ClipReward
from distill.rewards.dinov2 import Dinov2Reward
from distill.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, FillAndCrop, FitAndPad
from distill.shrink import tiny_t5_tokenizer

CLIP_TOKENS = 77
VIT_H_14: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "projection_dim": 1024,
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 1024,
    },
    "projection_dim": 1024,
}  # fmt: skip
"""Of HPSv2 and PickScore: 986 million parameters."""
DINOV2_LARGE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4, "patch_size": 14,
    "image_size": 518, "num_labels": 1000,
}  # fmt: skip


class Untrained:
    """Loaders for a task. stand_ins: rewards by name and what was made in their place."""

    def __init__(self, folder: Path) -> None:
        build_tokenizer(folder / "words", CLIP_TOKENS)
        self.words = CLIPTokenizer.from_pretrained(folder / "words")
        self.stand_ins: dict[str, str] = {}

    def teacher(self, recipe: DistillRecipe) -> Teacher:
        """The family and network of a recipe's teacher, by the configs of its folder or published ones."""
        name, configs = configs_of(recipe.teacher, recipe.family)
        with torch.device(device()):
            family, network = FAMILIES[name].from_config(configs, **options_for(recipe, name))
        family.schedule = with_grid(family.schedule, recipe)
        if name == "wan":
            family.tokenizer = tiny_t5_tokenizer()
        elif name in ("sd3", "flux"):
            family.tokenizers = [*[self.words] * (len(family.tokenizers) - 1), tiny_t5_tokenizer()]
        elif name != "sit":
            family.tokenizer = family.tokenizer_2 = self.words
        return Teacher(family, network.to(device()))

    def judge(self, name: str) -> Any:
        """A reward's architecture."""
        kind, _ = parse_reward(name)
        with torch.device(device()):
            if kind == "dinov2":
                classifier = Dinov2ForImageClassification(Dinov2Config.from_dict(DINOV2_LARGE))
                return Dinov2Reward(classifier, FillAndCrop(224, 256, IMAGENET_MEAN, IMAGENET_STD))
            if kind not in ("hpsv2", "hpsv2.1", "pickscore"):
                self.stand_ins[name] = "CLIP ViT-H/14"
            clip = CLIPModel(CLIPConfig.from_dict(VIT_H_14))
        prepare = FillAndCrop(224, 224) if kind == "pickscore" else FitAndPad(224)
        return ClipReward(clip, self.words, f"{name}, untrained", prepare=prepare)
