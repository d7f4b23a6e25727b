"""Weights in OpenCLIP's names as transformers' CLIPModel, which computes the same.

OpenCLIP keeps query, key and value in one matrix, projections transposed, and calls blocks ``resblocks``. Numbers of
heads are not in the weights: ViT-H/14, the one that preference models are tuned from, has heads of 80 in its image
tower and of 64 in its text tower, and GELU without approximation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from distill.rewards.weights import WeightsError, fill

VISION_HEAD, TEXT_HEAD = 80, 64
"""Widths of an attention head in ViT-H/14."""
_BLOCK = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def clip_from_openclip(tensors: dict[str, Tensor], origin: Path) -> Any:
    """A CLIPModel in float32 with the weights of an OpenCLIP checkpoint. Raises WeightsError for another model's."""
    for name in ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight"):
        if name not in tensors:
            raise WeightsError(f"{origin} is no OpenCLIP checkpoint: {name} is missing; give the published file")
    model: Any = CLIPModel(config_of(tensors))
    fill(model, renamed(tensors), origin, optional=("position_ids",))
    return model.eval()


def config_of(tensors: dict[str, Tensor]) -> CLIPConfig:
    """The architecture as far as shapes tell it, and ViT-H/14's widths of heads."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    places = len(tensors["visual.positional_embedding"]) - 1
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    projection = int(tensors["visual.proj"].shape[1])
    vision = {
        "hidden_size": width,
        "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _depth(tensors, "visual.transformer."),
        "num_attention_heads": width // VISION_HEAD,
        "image_size": round(places**0.5) * patch,
        "patch_size": patch,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _depth(tensors, "transformer."),
        "num_attention_heads": text_width // TEXT_HEAD,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        # OpenCLIP pools at the largest id, which is the end token, the last of the vocabulary.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": projection}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=projection)


def _depth(tensors: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(m[1]) for name in tensors if name.startswith(prefix) and (m := _BLOCK.fullmatch(name)))


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of transformers' CLIPModel; what it has no use for is left out."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in _WHOLE:
            found[_WHOLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif block := _BLOCK.fullmatch(name):
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            found |= _block(f"{tower}.encoder.layers.{block[1]}", block[2], value)
    return found


def _block(prefix: str, part: str, value: Tensor) -> dict[str, Tensor]:
    module, _, leaf = part.rpartition(".")
    if part.startswith("attn.in_proj_"):
        leaf = part.removeprefix("attn.in_proj_")
        pieces = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{leaf}": piece.contiguous() for letter, piece in pieces}
    return {f"{prefix}.{_PARTS[module]}.{leaf}": value} if module in _PARTS else {}
