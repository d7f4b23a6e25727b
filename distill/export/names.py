"""The names that the original code, and so ComfyUI, gives to the weights of diffusers' and transformers' classes.

Blocks are renumbered by the UNet's own number of layers, so that any UNet of the class has names; ComfyUI itself knows
the published sizes alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_shortcut": "nin_shortcut",
}
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
_OPENCLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def comfyui_module(name: str, family: str) -> str:
    """What ComfyUI calls a layer of the network in a LoRA file.

    UNets: ``lora_unet_`` and diffusers' name with underscores, which ComfyUI maps itself; the embedding of sizes has
    the original's name, the one that diffusers reads as well. Wan: the original's name after ``diffusion_model.``.
    """
    if family == "wan":
        return f"diffusion_model.{wan_name(name)}"
    spelt = _UNET[name] if name.startswith("add_embedding.") else name
    return "lora_unet_" + spelt.replace(".", "_")


def unet_name(name: str, layers: int, with_attention: Mapping[int, bool]) -> str:
    """A parameter of UNet2DConditionModel in the original's names.

    layers: layers_per_block; with_attention: by up block, which decides where its upsampler stands.
    """
    for ours, theirs in _UNET.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_inside(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} has no place in the original UNet; export to diffusers instead")
    way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if with_attention[block] else 1}.{rest}"
    start = f"input_blocks.{(layers + 1) * block + index + 1}" if way == "down" else ""
    start = start or f"output_blocks.{(layers + 1) * block + index}"
    return f"{start}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    part, _, leaf = rest.rpartition(".")
    return f"{_RESNET[part]}.{leaf}"


def vae_name(name: str, blocks: int) -> str:
    """A parameter of AutoencoderKL in the original's names. blocks: how many levels it has."""
    for ours, theirs in _VAE.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    if match := re.search(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        return f"encoder.down.{match[1]}.{_vae_block(match[2])}"
    if match := re.search(r"decoder\.up_blocks\.(\d+)\.(.+)", name):
        return f"decoder.up.{blocks - 1 - int(match[1])}.{_vae_block(match[2])}"
    return name


def _vae_block(rest: str) -> str:
    rest = re.sub(r"^resnets\.", "block.", rest)
    return rest.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")


def wan_name(name: str) -> str:
    """A parameter or layer of WanTransformer3DModel in the original's names."""
    if name == "scale_shift_table":
        return "head.modulation"
    dotted = f".{name}."
    for ours, theirs in _WAN.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    return dotted.strip(".")


def unet_state(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A UNet's weights under ``model.diffusion_model.``. config: the UNet's."""
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block is {layers}; the original UNet has as many in every block")
    attention = {i: "Attn" in kind for i, kind in enumerate(config["up_block_types"])}
    return {f"model.diffusion_model.{unet_name(name, layers, attention)}": value for name, value in state.items()}


def vae_state(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """An autoencoder's weights under ``first_stage_model.``; its attention's matrices become 1 × 1 convolutions."""
    blocks, found = len(config["block_out_channels"]), {}
    for name, value in state.items():
        theirs = vae_name(name, blocks)
        if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", theirs) and value.ndim == 2:
            value = value[:, :, None, None]
        found[f"first_stage_model.{theirs}"] = value
    return found


def clip_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIPTextModel's weights in transformers' first names, which every checkpoint has."""
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


def openclip_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection's weights in OpenCLIP's names: one matrix for query, key and value."""
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "ln_final.weight": plain["final_layer_norm.weight"],
        "ln_final.bias": plain["final_layer_norm.bias"],
        "text_projection": plain["text_projection.weight"].T.contiguous(),
    }
    for name, value in plain.items():
        if not (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            continue
        block, part, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if part == "self_attn.q_proj":
            start = name.removesuffix(f"q_proj.{leaf}")
            rows = [plain[f"{start}{letter}_proj.{leaf}"] for letter in "qkv"]
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(rows)
        elif part in _OPENCLIP:
            found[f"{block}.{_OPENCLIP[part]}.{leaf}"] = value
    return {prefix + name: value for name, value in found.items()}
