"""Fixtures shared by all tests: a small random-weight bundle of the real classes, exported by the real code."""

from __future__ import annotations

import os
import tempfile

# Read by prometheus_client and bentoml when they are imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="leapfrog-metrics-"))
os.environ.setdefault("BENTOML_HOME", tempfile.mkdtemp(prefix="leapfrog-bentoml-"))
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LEAPFROG_DEVICE", "cpu")  # what tests make lies there, also on a machine with a GPU

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from distill.bundle import Manifest

WORDS = ("a", "small", "large", "red", "blue", "green", "metal", "rubber", "sphere", "cube", "cylinder", "left", "of")
MAX_TOKENS = 16
STEPS = (1, 2, 4, 8)


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle before its export: an SDXL-type student with random weights, 64×64 pixels, 4 × 16 × 16 latents."""
    from distill.bundle import write_manifest

    root = tmp_path_factory.mktemp("bundles") / "tiny-sdxl"
    save_tiny_pipeline(root)
    write_manifest(root, tiny_manifest())
    return root


@pytest.fixture(scope="session")
def tiny_bundle(tiny_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with its ONNX engines. Tests must not change it; copy it first."""
    import shutil

    from distill.export.run import export_onnx

    root = tmp_path_factory.mktemp("exported") / "tiny-sdxl"
    shutil.copytree(tiny_sources, root)
    export_onnx(root, say=lambda line: None)
    return root


@pytest.fixture(scope="session")
def tiny_video_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan student with random weights before its export: 5 frames of 32×32 pixels, 4 × 3 × 16 × 16 latents."""
    from distill.bundle import write_manifest

    root = tmp_path_factory.mktemp("bundles") / "tiny-wan"
    write_manifest(root, save_tiny_video_pipeline(root))
    return root


@pytest.fixture(scope="session")
def tiny_video_bundle(tiny_video_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with its ONNX engines, alone in its folder. Tests must not change it; copy it first."""
    import shutil

    from distill.export.run import export_onnx

    root = tmp_path_factory.mktemp("exported-videos") / "tiny-wan"
    shutil.copytree(tiny_video_sources, root)
    export_onnx(root, say=lambda line: None)
    return root


@pytest.fixture
def manifest() -> Manifest:
    """The tiny bundle's manifest before files and engines are known."""
    return tiny_manifest()


def tiny_manifest() -> Manifest:
    from distill.bundle import Manifest, Sampler
    from distill.sampling import ScaledLinear, student_table

    schedule = ScaledLinear()
    samplers = {n: Sampler.of(student_table(schedule, "epsilon", schedule.grid(n))) for n in STEPS}
    return Manifest(
        name="tiny-sdxl",
        family="sdxl",
        task="text-to-image",
        prediction="epsilon",
        latent_channels=4,
        latent_stride=4,
        sizes=((64, 64),),
        max_tokens=MAX_TOKENS,
        samplers=samplers,
        default_steps=4,
        preview=((0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.1, 0.1, 0.1), (0.0, 0.0, 0.0)),
        examples=("a small red metal sphere", "a large blue rubber cube left of a green cylinder"),
        provenance={"made_by": "tests/conftest.py with random weights"},
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-level tokenizer: WORDS are one token each, anything else falls back to its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for letter in [*word[1:-1], *([word[-1] + "</w>"] if len(word) > 1 else [])]:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            if left not in tokens:
                tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )


def save_tiny_pipeline(root: Path) -> None:
    """Write a diffusers folder of StableDiffusionXLPipeline with seeded random weights in float16."""
    import torch
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from distill.export.folder import save_pipeline

    tokenizer = tiny_tokenizer()

    def text_config(projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=projection,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 48),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=1,
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
        with torch.no_grad():
            # A random decoder paints grey on grey; three times the contrast lets pictures differ.
            vae.decoder.conv_out.weight *= 3
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config(32)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(32)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            # With 1000 original steps its four steps are ours: 999, 749, 499, 249.
            scheduler=LCMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=1000
            ),
            add_watermarker=False,
        )
    save_pipeline(pipeline, root)


def save_tiny_video_pipeline(root: Path) -> Manifest:
    """Write a diffusers folder of WanPipeline with seeded random weights in float16; returns its manifest.

    One level of the autoencoder instead of three, as compiling takes seconds per level: 2 pixels and frames a latent.
    """
    import torch

    from distill.bundle import Manifest, Sampler
    from distill.families.wan import Wan
    from distill.sampling import student_table
    from distill.shrink import tiny_t5_tokenizer

    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 32, "freq_dim": 16}
    levels = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "temperal_downsample": [True], "attn_scales": []}
    configs = {
        "transformer": {**heads, "in_channels": 4, "out_channels": 4, "text_dim": 16},
        "vae": {
            **levels,
            "num_res_blocks": 0,
            "scale_factor_spatial": 2,
            "scale_factor_temporal": 2,
            "latents_mean": [-0.5, -0.25, 0.25, 0.5],
            "latents_std": [1.5, 2.0, 2.5, 3.0],
        },
        "text_encoder": {
            **{"vocab_size": 300, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1},
            "feed_forward_proj": "gated-gelu",
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family, network = Wan.from_config(configs, size=(32, 32), frames=5)
        with torch.no_grad():
            family.vae.decoder.conv_out.weight *= 30  # a random decoder paints grey on grey
    family.text_encoder.half()
    family.tokenizer = tiny_t5_tokenizer()
    family.save(network, root)
    grids = {n: family.schedule.grid(n) for n in (1, 2, 4)}
    told = {**family.describe(), "fps": 8.0}
    return Manifest(
        name="tiny-wan",
        samplers={n: Sampler.of(student_table(family.schedule, "flow", grid)) for n, grid in grids.items()},
        default_steps=4,
        examples=("a small red metal sphere rolling right", "a large blue rubber cube left of a green cylinder"),
        provenance={"made_by": "tests/conftest.py with random weights"},
        **told,
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
