"""SiT's checkpoints: what the converted transformer computes equals SiT's own forward pass, written here from its paper
and code with its key names."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from distill.convert.__main__ import main
from distill.convert.sit import convert, read, time_map, transformer_of
from distill.families.load import family_of
from distill.families.sit import Sit

WIDTH, DEPTH, HEADS, CLASSES, SIDE, PATCH, CHANNELS = 32, 2, 4, 5, 8, 2, 4


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights with SiT's names, none of them zero."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
        "final_layer.linear.bias": (PATCH * PATCH * 2 * CHANNELS,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH), ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    weights = {name: torch.randn(shape, generator=rng) / 6 for name, shape in shapes.items()}
    positions = get_2d_sincos_pos_embed(WIDTH, SIDE // PATCH, base_size=SIDE // PATCH, output_type="np")
    return {**weights, "pos_embed": torch.from_numpy(np.asarray(positions)).float()[None]}


def reference(w: dict[str, Tensor], x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """SiT's forward pass at its own time s (1 is data): the velocity x0 − ε."""
    batch = len(x)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = s[:, None] * frequencies
    time = torch.cat((angles.cos(), angles.sin()), 1)
    time = linear(time, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"])
    time = linear(silu(time), w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    c = silu(time + w["y_embedder.embedding_table.weight"][labels])
    h = nn.functional.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    for i in range(DEPTH):

        def layer(value: Tensor, name: str, i: int = i) -> Tensor:
            return linear(value, w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"])

        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layer(c, "adaLN_modulation.1")[:, None].chunk(6, 2)
        a = layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale_a) + shift_a
        q, k, v = layer(a, "attn.qkv").reshape(batch, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        a = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate_a * layer(a, "attn.proj")
        m = layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale_m) + shift_m
        h = h + gate_m * layer(gelu(layer(m, "mlp.fc1"), approximate="tanh"), "mlp.fc2")
    last = linear(c, w["final_layer.adaLN_modulation.1.weight"], w["final_layer.adaLN_modulation.1.bias"])
    shift, scale = last[:, None].chunk(2, 2)
    h = layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    h = linear(h, w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    grid = SIDE // PATCH
    h = h.reshape(batch, grid, grid, PATCH, PATCH, 2 * CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(batch, 2 * CHANNELS, SIDE, SIDE)[:, :CHANNELS]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        sample_size=16, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.18215,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@torch.no_grad()
def test_the_converted_network_computes_what_sit_computes() -> None:
    weights = checkpoint()
    network = transformer_of(weights, HEADS)
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(7, CHANNELS, SIDE, SIDE, generator=rng), torch.tensor([0.0, 0.02, 0.3, 0.5, 0.77, 0.98, 1.0])
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    found = network(x, timestep=1000 * t, class_labels=labels).sample
    expected = -reference(weights, x, 1 - t, labels)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    wrong = -reference(weights, x, t, labels)
    assert float((found - wrong).abs().max()) > 0.05


def test_the_time_embeddings_of_both_worlds_are_one_linear_map_apart() -> None:
    t = torch.rand(500, generator=torch.Generator().manual_seed(0))
    ours = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    theirs = get_timestep_embedding(1 - t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    matrix = time_map()
    assert np.abs(matrix).max() < 0.05
    np.testing.assert_allclose(ours.double().numpy() @ matrix.T, theirs.numpy(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_checkpoint_becomes_a_folder_that_the_family_and_diffusers_load(
    vae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint()
    path = tmp_path / "sit.pt"
    raw = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"model": raw, "ema": weights, "args": Namespace(model="SiT-XL/2")}, path)
    out = tmp_path / "out"
    assert main([str(path), str(out), "--vae", vae, "--heads", str(HEADS)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert family_of(out) == "sit"
    family, network = Sit.from_folder(out)
    assert (family.classes, family.latent_shape(), family.size, family.prediction) == (5, (4, 8, 8), (16, 16), "flow")
    x, t = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([0.25, 0.9], dtype=torch.float64)
    found = family.predict(network.eval(), x, t, family.encode([3, 1]))
    velocity = reference(weights, x, 1 - t.float(), torch.tensor([3, 1]))
    torch.testing.assert_close(found.x0, x + t.float().reshape(-1, 1, 1, 1) * velocity, rtol=1e-4, atol=1e-4)
    empty = family.predict(network, x, t, family.unconditional(2)).x0
    nothing = reference(weights, x, 1 - t.float(), torch.tensor([CLASSES] * 2))
    torch.testing.assert_close(empty, x + t.float().reshape(-1, 1, 1, 1) * nothing, rtol=1e-4, atol=1e-4)
    pipeline: Any = DiTPipeline.from_pretrained(out)
    assert pipeline.vae.config.scaling_factor == 0.18215


def test_faults_are_named(vae: str, tmp_path: Path) -> None:
    weights = checkpoint()
    with pytest.raises(ValueError, match="the width is 32, which is none of 384, 768, 1024, 1152; name --heads"):
        transformer_of(weights)
    with pytest.raises(ValueError, match="pos_embed differs from sines and cosines by"):
        transformer_of({**weights, "pos_embed": weights["pos_embed"] + 0.1}, HEADS)
    with pytest.raises(ValueError, match=r"does not fit a plain SiT: 'blocks.1.mlp.fc2.weight'"):
        transformer_of({name: v for name, v in weights.items() if "blocks.1.mlp" not in name or "fc1" in name}, HEADS)
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"keys such as conv.weight; a SiT checkpoint has x_embedder.proj.weight"):
        read(tmp_path / "other.safetensors")
    save_file(weights, tmp_path / "sit.safetensors")
    with pytest.raises(ValueError, match="vae: there is no folder 'nowhere'"):
        convert(tmp_path / "sit.safetensors", tmp_path / "out", "nowhere", heads=HEADS)
    assert not (tmp_path / "out").exists()
