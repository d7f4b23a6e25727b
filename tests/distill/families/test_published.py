"""Published teachers as configs: the numbers of parameters that they lead to are the published ones."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from distill.costs import count
from distill.families.load import FAMILIES
from distill.families.published import PUBLISHED, USUAL, configs_of
from distill.families.wan import NEGATIVE_PROMPT

COUNTS = {
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863, 123_060_480),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        2_028_328_000,
        83_819_683,
        123_650_304,
        694_659_840,
        4_762_310_656,
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        2_243_171_520,
        83_819_683,
        123_650_304,
        694_659_840,
        4_762_310_656,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        8_056_627_520,
        83_819_683,
        123_650_304,
        694_659_840,
        4_762_310_656,
    ),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 83_819_683, 123_060_480, 4_762_310_656),
    "black-forest-labs/FLUX.1-schnell": (11_891_178_560, 83_819_683, 123_060_480, 4_762_310_656),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1_418_996_800, 126_892_531, 5_680_910_336),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14_288_491_584, 126_892_531, 5_680_910_336),
}
"""Network, autoencoder and text encoders: from the published files' sizes.

SD3's files hold its positions as well, no parameters here; 4.17, 4.94 and 16.3 GB in float16 give three digits.
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_sizes(name: str) -> None:
    family, configs = configs_of(name)
    with torch.device("meta"):
        made, network = FAMILIES[family].from_config(configs)
    assert (count(network), *(count(part) for part in made.parts.values())) == COUNTS[name]
    assert all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize(("name", "factor"), [("sdxl", 0.13025), ("sd15", 0.18215), ("sit", 0.18215)])
def test_latents_have_the_published_scale(name: str, factor: float) -> None:
    """Of the files stabilityai/stable-diffusion-xl-base-1.0, …/stable-diffusion-v1-5 and sd-vae-ft-ema."""
    with torch.device("meta"):
        family, _ = FAMILIES[name].from_config(USUAL[name])
    assert family.vae.config.scaling_factor == factor


def test_wans_latents_and_negative_prompt_are_the_published_ones() -> None:
    """wan/modules/vae.py and wan/configs/shared_config.py of Wan-Video/Wan2.1."""
    with torch.device("meta"):
        family, _ = FAMILIES["wan"].from_config({**USUAL["wan"], "transformer": {"num_layers": 1}})
    mean, deviation = family.vae.config.latents_mean, family.vae.config.latents_std
    assert (len(mean), mean[0], mean[-1]) == (16, -0.7571, -0.2921)
    assert (len(deviation), deviation[0], deviation[-1]) == (16, 2.8184, 1.9160)
    digest = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert sha256(NEGATIVE_PROMPT.encode()).hexdigest() == digest


def test_sits_blocks_each_hold_the_embeddings() -> None:
    with torch.device("meta"):
        family, network = FAMILIES["sit"].from_config(USUAL["sit"])
    shared = sum(p.numel() for name, p in network.named_parameters() if "transformer_blocks.0.norm1.emb" in name)
    # SiT-XL/2 has 675 M parameters: one copy of the embeddings, 256 frozen positions, and a variance in its last layer.
    assert count(network) - 27 * shared + 256 * 1152 + 4 * 4 * (1152 + 1) == 675_129_632
    assert (family.classes, family.latent_shape(), family.schedule.shift) == (1000, (4, 32, 32), 1.0)


def test_a_folder_here_goes_before_what_is_published(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_layers": 3}))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert configs_of(str(tmp_path)) == ("wan", {"transformer": {"num_layers": 3}})
    assert configs_of("models/nowhere", "sit") == ("sit", USUAL["sit"])
    with pytest.raises(ValueError, match=r"'models/nowhere' is no folder here and none of .* name its family"):
        configs_of("models/nowhere")
