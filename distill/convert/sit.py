"""SiT's published checkpoints (willisma/SiT, models.py) as a DiTTransformer2DModel in diffusers' own conventions.

SiT runs time from noise to data, s = 1 − t, reads s itself, and predicts x0 − ε. diffusers' flow schedulers run from
data to noise, hand over 1000·t, and expect ε − x0. All three differences, and a fourth in the frequencies of the time
embedding, are linear and go into weights, so that the converted network needs nothing that remembers where it is from:

* the output's sign into the last layer, of which the channels of the unused variance are dropped as well;
* the time into the first layer of its embedding. SiT embeds s as cos, sin of s·10000^(−k/128), diffusers embeds 1000·t
  as cos, sin of 1000·t·10000^(−k/127). On t ∈ [0, 1] the former are smooth and lie in the span of the latter's
  frequencies up to 10: a least-squares map with entries below 0.05 gives them back to 3e-8, float32's own rounding.

diffusers' blocks each have the time and label embedding that SiT's share: 749.8 M parameters in the place of 675 M.
They are equal at first, and training may tell them apart.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from distill.hub import is_hub_id, snapshot

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width: S, B, L and XL (SiT_models)."""
_IGNORED = ("projectors.",)
"""What training added beside the model: REPA's projections."""
_HALF = 128


def convert(checkpoint: Path, output: Path, vae: str, *, heads: int | None = None) -> int:
    """Write the diffusers folder and return the number of the transformer's parameters. Raises ValueError."""
    if not Path(vae).is_dir() and not is_hub_id(vae):
        raise ValueError(f"vae: there is no folder {vae!r}; give one, or a hub id such as stabilityai/sd-vae-ft-ema")
    network = transformer_of(read(checkpoint), heads)
    folder = vae if Path(vae).is_dir() else str(snapshot(vae, "vae", ("*.json", "*.safetensors")))
    autoencoder: Any = AutoencoderKL.from_pretrained(folder)
    if autoencoder.config.latent_channels != network.config.in_channels:
        raise ValueError(
            f"vae has {autoencoder.config.latent_channels} channels, the checkpoint {network.config.in_channels}; "
            "give the autoencoder that it was trained on"
        )
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    network.save_pretrained(output / "transformer")
    autoencoder.save_pretrained(output / "vae")
    scheduler.save_pretrained(output / "scheduler")
    DiTPipeline(network, autoencoder, scheduler).save_config(output)  # type: ignore[attr-defined]
    return sum(p.numel() for p in network.parameters())


def read(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, float32 by name. Pickles are read without running any code of theirs."""
    if checkpoint.suffix == ".safetensors":
        found: Any = load_file(checkpoint)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of SiT's training script
            found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    found = found.get("ema", found)
    if "x_embedder.proj.weight" not in found:
        first = ", ".join(list(found)[:3])
        raise ValueError(f"{checkpoint} has keys such as {first}; a SiT checkpoint has x_embedder.proj.weight")
    return {name: value.float() for name, value in found.items() if not name.startswith(_IGNORED)}


def transformer_of(weights: dict[str, Tensor], heads: int | None = None) -> Any:
    """The DiTTransformer2DModel that computes what SiT does with these weights, in diffusers' time and sign."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name)))
    if (heads or HEADS.get(width)) is None:
        raise ValueError(f"the width is {width}, which is none of {', '.join(map(str, HEADS))}; name --heads")
    side = round(weights["pos_embed"].shape[1] ** 0.5) * patch
    network: Any = DiTTransformer2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
        num_layers=depth,
        num_attention_heads=heads or HEADS[width],
        attention_head_dim=width // (heads or HEADS[width]),
        num_embeds_ada_norm=len(weights["y_embedder.embedding_table.weight"]) - 1,
        norm_num_groups=1,
        norm_eps=1e-6,
    )
    _check_positions(weights["pos_embed"], network.pos_embed.pos_embed)
    try:
        network.load_state_dict(dict(_renamed(weights, depth, channels, patch)))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the checkpoint does not fit a plain SiT: {error}; convert one of willisma/SiT") from None
    return network.eval()


def _check_positions(theirs: Tensor, ours: Tensor) -> None:
    error = float((theirs - ours.to(theirs)).abs().max())
    if error > 1e-4:
        raise ValueError(f"pos_embed differs from sines and cosines by {error:.2g}; a trained one is not converted")


def _renamed(weights: dict[str, Tensor], depth: int, channels: int, patch: int) -> list[tuple[str, Tensor]]:
    """diffusers' names with SiT's values, the time embedding and the last layer transformed."""
    timed = {**weights, "t_embedder.mlp.0.weight": time_layer(weights["t_embedder.mlp.0.weight"])}
    moved = [(f"pos_embed.proj.{part}", weights[f"x_embedder.proj.{part}"]) for part in ("weight", "bias")]
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        moved.append(
            (f"{ours}.norm1.emb.class_embedder.embedding_table.weight", weights["y_embedder.embedding_table.weight"])
        )
        for part in ("weight", "bias"):
            q, k, v = weights[f"{theirs}.attn.qkv.{part}"].chunk(3)
            moved += [(f"{ours}.attn1.to_{name}.{part}", value) for name, value in (("q", q), ("k", k), ("v", v))]
            names = {
                "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
                "norm1.linear": f"{theirs}.adaLN_modulation.1",
                "attn1.to_out.0": f"{theirs}.attn.proj",
                "ff.net.0.proj": f"{theirs}.mlp.fc1",
                "ff.net.2": f"{theirs}.mlp.fc2",
            }
            moved += [(f"{ours}.{name}.{part}", timed[f"{source}.{part}"]) for name, source in names.items()]
    for part in ("weight", "bias"):
        moved.append((f"proj_out_1.{part}", weights[f"final_layer.adaLN_modulation.1.{part}"]))
        moved.append((f"proj_out_2.{part}", last_layer(weights[f"final_layer.linear.{part}"], channels, patch)))
    return moved


def last_layer(weight: Tensor, channels: int, patch: int) -> Tensor:
    """Rows (p, p, 2C or C) of the last layer to (p, p, C) with the sign of ε − x0."""
    rows = weight.reshape(patch * patch, -1, *weight.shape[1:])
    return -rows[:, :channels].flatten(0, 1)


def time_layer(weight: Tensor) -> Tensor:
    """(D, 256) on SiT's embedding of 1 − t to (D, 256) on diffusers' embedding of 1000·t."""
    return (weight.double() @ torch.from_numpy(time_map())).float()


def time_map(highest: float = 10.0) -> NDArray[np.float64]:
    """(256, 256) with SiT's features of 1 − t = map · diffusers' of 1000·t; zero beyond the frequency ``highest``."""
    k = np.arange(_HALF)
    theirs, ours = 10000.0 ** (-k / _HALF), 1000.0 * 10000.0 ** (-k / (_HALF - 1))
    t = np.linspace(0.0, 1.0, 4001)[:, None]
    wanted = np.concatenate((np.cos((1 - t) * theirs), np.sin((1 - t) * theirs)), 1)
    low = ours <= highest
    offered = np.concatenate((np.cos(t * ours[low]), np.sin(t * ours[low])), 1)
    solution = np.linalg.lstsq(offered, wanted, rcond=1e-10)[0]
    full = np.zeros((2 * _HALF, 2 * _HALF))
    full[np.concatenate((low, low))] = solution
    return full.T
