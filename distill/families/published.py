"""What published teachers are made of: the configs of their diffusers folders, as far as they differ from the classes'.

So a recipe can be planned without its weights: ``configs_of("stabilityai/stable-diffusion-xl-base-1.0")``. The numbers
of parameters that they lead to are tested against the published ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Configs = dict[str, dict[str, Any]]
"""Configs by component: unet or transformer, vae, text_encoder, text_encoder_2, scheduler."""

_SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIG_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def _vae(sample_size: int, scaling_factor: float) -> dict[str, Any]:
    """Stable Diffusion's autoencoder: 4 channels, 8 pixels per latent."""
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


def _vae_of_16(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    """Stable Diffusion 3's and FLUX's autoencoder: 16 channels, a mean beside the deviation."""
    constants = {"shift_factor": shift_factor, "use_quant_conv": False, "use_post_quant_conv": False}
    return {**_vae(1024, scaling_factor), **constants, "latent_channels": 16}


def _sd3(transformer: dict[str, Any]) -> Configs:
    shared = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64}
    return {
        "transformer": {**shared, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, **transformer},
        "vae": _vae_of_16(1.5305, 0.0609),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_BIG_G,
        "text_encoder_3": _T5_XXL,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    }


SDXL: Configs = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _vae(1024, 0.13025),
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
    "scheduler": {"_class_name": "EulerDiscreteScheduler", **_SCALED_LINEAR},
}
SD15: Configs = {
    "unet": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "vae": _vae(512, 0.18215),
    "text_encoder": _CLIP_L,
    "scheduler": {"_class_name": "PNDMScheduler", **_SCALED_LINEAR},
}
SD3_MEDIUM = _sd3(
    {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
)
SD35_MEDIUM = _sd3(
    {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    }
)
SD35_LARGE = _sd3(
    {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }
)
FLUX_DEV: Configs = {
    "transformer": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
    "vae": _vae_of_16(0.3611, 0.1159),
    "text_encoder": _CLIP_L,
    "text_encoder_2": _T5_XXL,
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
FLUX_SCHNELL: Configs = {
    **FLUX_DEV,
    "transformer": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": False},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
}
SIT_XL_2: Configs = {
    "transformer": {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-6,
    },
    "vae": _vae(256, 0.18215),
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
}
WAN_1_3B: Configs = {
    "transformer": {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
    "vae": {},
    "text_encoder": _UMT5_XXL,
    "scheduler": {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
}
WAN_14B: Configs = {
    **WAN_1_3B,
    "transformer": {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824},
}

PUBLISHED: dict[str, tuple[str, Configs]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", SDXL),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", SD15),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3", SD3_MEDIUM),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", SD35_LARGE),
    "black-forest-labs/FLUX.1-dev": ("flux", FLUX_DEV),
    "black-forest-labs/FLUX.1-schnell": ("flux", FLUX_SCHNELL),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", WAN_1_3B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan", WAN_14B),
}
"""Hub ids with their families and configs."""
USUAL: dict[str, Configs] = {
    "sdxl": SDXL,
    "sd15": SD15,
    "sd3": SD3_MEDIUM,
    "flux": FLUX_DEV,
    "sit": SIT_XL_2,
    "wan": WAN_1_3B,
}
"""What a family's teacher is when its folder is not there yet."""


def configs_of(source: str, family: str | None = None) -> tuple[str, Configs]:
    """(family, configs) of a teacher: from its folder if that is here, else what is published under its id or family.

    Raises ValueError for a source that is neither here nor known.
    """
    folder = Path(source)
    if folder.is_dir():
        return family or _family(folder), _read(folder)
    if source in PUBLISHED:
        return PUBLISHED[source]
    if family is None:
        raise ValueError(
            f"{source!r} is no folder here and none of {', '.join(PUBLISHED)}; name its family: {', '.join(USUAL)}"
        )
    return family, USUAL[family]


def _family(folder: Path) -> str:
    from distill.families.load import family_of

    manifest = folder / "bundle.json"
    return str(json.loads(manifest.read_text())["family"]) if manifest.is_file() else family_of(folder)


def _read(folder: Path) -> Configs:
    """The configs in a diffusers folder."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/config.json"))}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return {**found, **({"scheduler": json.loads(scheduler.read_text())} if scheduler.is_file() else {})}
