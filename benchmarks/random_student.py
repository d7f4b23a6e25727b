"""A student of Stable Diffusion's build and random weights, exported, to be timed: speed does not depend on weights.

    python -m benchmarks.random_student /tmp/sd-200m
    python -m benchmarks.inference /tmp/sd-200m --batches 1 --repeats 5

Its UNet has SD1.5's blocks at half the width (220 M parameters) and SDXL's conditioning, its autoencoder is Stable
Diffusion's own (84 M); 256×256 pixels, 32×32 latents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from distill.bundle import Bundle, BundleError, Manifest, Sampler, write_manifest
from distill.data.tokenizer import build_tokenizer
from distill.export.onnx import ExportError
from distill.export.run import export_onnx
from distill.families.load import FAMILIES
from distill.families.published import SD15, Configs
from distill.sampling import student_table

CHANNELS = 160
"""Of the first block; SD1.5 has 320."""
SIDE = 256
STEPS = (1, 4)
MAX_TOKENS = 77
TIME_DIM = 256
"""Of each of SDXL's six sizes."""


def configs(vocabulary: int, begin: int, end: int, channels: int = CHANNELS) -> Configs:
    """Of a diffusers folder of SDXL's kind. vocabulary, begin, end: of the tokenizer."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "projection_dim": 384,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    unet = {
        **SD15["unet"],
        "sample_size": SIDE // 8,
        "block_out_channels": [channels, 2 * channels, 4 * channels, 4 * channels],
        "cross_attention_dim": 2 * 384,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_DIM,
        "projection_class_embeddings_input_dim": 384 + 6 * TIME_DIM,
    }
    return {**SD15, "unet": unet, "text_encoder": text, "text_encoder_2": text}


def save_student(folder: Path, channels: int = CHANNELS) -> Bundle:
    """Write the bundle to a new folder, without engines; always the same one."""
    with tempfile.TemporaryDirectory() as words:
        build_tokenizer(Path(words), MAX_TOKENS)
        tokenizer = CLIPTokenizer.from_pretrained(words)
    begin, end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made, network = FAMILIES["sdxl"].from_config(configs(len(tokenizer), begin, end, channels))
    family: Any = made
    family.tokenizer = family.tokenizer_2 = tokenizer
    family.save(network, folder)
    schedule = family.schedule
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    manifest = Manifest(
        name=folder.name,
        family="sdxl",
        task="text-to-image",
        prediction="epsilon",
        latent_channels=4,
        latent_stride=8,
        sizes=((SIDE, SIDE),),
        max_tokens=MAX_TOKENS,
        samplers={n: Sampler.of(student_table(schedule, "epsilon", schedule.grid(n))) for n in STEPS},
        default_steps=max(STEPS),
        preview=((0.0, 0.0, 0.0),) * 5,
        provenance={"made_by": "benchmarks.random_student", "parameters_of_unet_M": round(millions, 1)},
    )
    return write_manifest(folder, manifest)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_student",
        description="Write and export a bundle of Stable Diffusion's build with random weights.",
        epilog="example: python -m benchmarks.random_student /tmp/sd-200m",
    )
    parser.add_argument("folder", type=Path, help="new folder of the bundle; 0.6 GB")
    parser.add_argument("--channels", type=int, default=CHANNELS, help="of the first block; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.channels < 32 or options.channels % 32:
        parser.error(f"--channels is {options.channels}; give a multiple of 32, the groups of its norms")
    if options.folder.exists():
        parser.error(f"{options.folder} exists; give a new folder")
    bundle = save_student(options.folder, options.channels)
    print(f"wrote {options.folder}: a UNet of {bundle.manifest.provenance['parameters_of_unet_M']} M parameters")
    try:
        export_onnx(options.folder)
    except (BundleError, ExportError) as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
