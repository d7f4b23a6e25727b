"""ImageReward: a BLIP that reads the prompt across the picture, and a small head (Xu et al., arXiv 2304.05977).

    reward = load_reward("imagereward")                          # from the hub: zai-org/ImageReward
    reward = load_reward("imagereward:/models/image-reward")     # ImageReward.pt and a BERT tokenizer in this folder

r = (head(h) − 0.16717)/1.03334, h the text encoder's state at its first token with attention across the picture.
Prompts are cut at 35 tokens, as in the reference: long ones are judged by their beginning. Computed by transformers'
BLIP modules; equal to the package (image-reward 1.5) to 3e-7 on pictures of its own size, to 1e-3
on others, with weights drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from distill.parallel.device import moved
from distill.rewards.base import check_counts
from distill.rewards.pixels import FillAndCrop
from distill.rewards.weights import WeightsError, digest_of, fill, find_file, find_folder, read_tensors

SOURCE, FILES = "zai-org/ImageReward", ("ImageReward.safetensors", "ImageReward.pt")
TOKENIZER_SOURCE = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's outputs on the authors' data."""
HEAD_WIDTH = 64
"""Of an attention head, in both towers of BLIP-large."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageReward(nn.Module):
    """vision: BlipVisionModel, text: BlipTextModel, head: five linear layers without activations between them."""

    range = (-4.0, 4.0)
    requires_grad = True

    def __init__(self, vision: Any, text: Any, tokenizer: Any, *, digest: str = "") -> None:
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.head = head(int(text.config.hidden_size))
        self.name, self.digest = "imagereward", digest
        size = int(vision.config.image_size)
        self.prepare = FillAndCrop(size, size, centre="torchvision")

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        check_counts(images, conditions, "prompt")
        return self.score_pixels(images.float() / 127.5 - 1.0, conditions)

    def score_pixels(self, pixels: Tensor, conditions: Sequence[str]) -> Tensor:
        seen = self.vision(pixel_values=self.prepare(pixels)).last_hidden_state
        words = self.tokenizer(
            list(conditions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        read = self.text(
            input_ids=moved(words.input_ids, pixels.device),
            attention_mask=moved(words.attention_mask, pixels.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=pixels.device),
        )
        return (self.head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD  # type: ignore[no-any-return]


def head(width: int) -> nn.Sequential:
    """The reference's widths; its dropout between them is off in use, but counts in the names of its weights."""
    layers: list[nn.Module] = []
    for wide, narrow, dropout in ((width, 1024, 0.2), (1024, 128, 0.2), (128, 64, 0.1), (64, 16, None), (16, 1, None)):
        layers += [nn.Linear(wide, narrow)] + ([nn.Dropout(dropout)] if dropout else [])
    return nn.Sequential(*layers)


def load_imagereward(source: str | Path = SOURCE) -> ImageReward:
    """source: the checkpoint, its folder or a hub id. Raises WeightsError."""
    path = find_file(source, FILES, "imagereward")
    tensors = read_tensors(path)
    for name in ("blip.visual_encoder.patch_embed.proj.weight", "mlp.layers.0.weight"):
        if name not in tensors:
            raise WeightsError(f"{path} is no ImageReward checkpoint: {name} is missing; give the published file")
    vision: Any = BlipVisionModel(vision_config(tensors))
    text: Any = BlipTextModel(text_config(tensors), add_pooling_layer=False)
    fill(vision, vision_tensors(tensors), path)
    prefix = "blip.text_encoder."
    fill(text, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)
    beside = path.parent if (path.parent / "vocab.txt").is_file() else path.parent / "tokenizer"
    reward = ImageReward(
        vision, text, load_tokenizer(beside if beside.is_dir() else TOKENIZER_SOURCE, text), digest=digest_of(path)
    )
    fill(reward.head, {k.removeprefix("mlp.layers."): v for k, v in tensors.items() if k.startswith("mlp.")}, path)
    return reward.eval().requires_grad_(False)


def load_tokenizer(source: str | Path, text: Any) -> Any:
    """BERT's uncased tokenizer. BLIP's text encoder knows two tokens more, which never occur in a prompt."""
    expected = int(text.config.vocab_size) - 2
    folder = find_folder(source, "imagereward's tokenizer", weights=False)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
        found = f"{len(tokenizer)} tokens for a text encoder of {expected}"
    except (OSError, ValueError):
        tokenizer, found = None, "no tokenizer"
    if tokenizer is None or len(tokenizer) != expected:
        raise WeightsError(
            f"imagereward: {str(source)!r} gives {found}; put vocab.txt of bert-base-uncased beside the weights, or "
            f"run: hf download {TOKENIZER_SOURCE}"
        )
    return tokenizer


def vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    prefix = "blip.visual_encoder."
    width, _, patch, _ = tensors[prefix + "patch_embed.proj.weight"].shape
    places = tensors[prefix + "pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors[prefix + "blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_depth(tensors, prefix + r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def text_config(tensors: dict[str, Tensor]) -> BlipTextConfig:
    """BERT that attends across the picture in every layer; ``is_decoder`` is what gives transformers' BLIP that."""
    prefix = "blip.text_encoder."
    vocabulary, width = tensors[prefix + "embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=int(tensors[prefix + "encoder.layer.0.crossattention.self.key.weight"].shape[1]),
        intermediate_size=len(tensors[prefix + "encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(tensors, prefix + r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(tensors[prefix + "embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,
    )


def vision_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower under the names of transformers' BlipVisionModel."""
    found, prefix = {}, "blip.visual_encoder."
    for name, value in tensors.items():
        name = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if name in _VISION:
            found[_VISION[name]] = value
        elif block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            found[f"encoder.layers.{block[1]}.{_BLOCK.get(block[2], block[2])}.{block[3]}"] = value
    return found


def _depth(tensors: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))
