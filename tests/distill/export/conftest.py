"""Bundles to publish: a student whose UNet is its teacher's and a change of low rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from distill.bundle import Bundle, write_manifest

RANK = 3
Change = Callable[[Any], None]


def of_low_rank(network: Any) -> None:
    """Change what a LoRA may: attention and feed-forward matrices, by rank 3."""
    generator = torch.Generator().manual_seed(1)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".transformer_blocks." in name:
            out, into = module.weight.shape
            up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, into, generator=generator)
            module.weight.data += 0.2 * up @ down / into**0.5


def everywhere(network: Any) -> None:
    """Change every parameter, norms and convolutions too."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def student_of(tiny_sources: Path, tmp_path: Path) -> Callable[[Change], Bundle]:
    """A bundle whose UNet is the tiny teacher's, changed, in float32."""

    def make(change: Change) -> Bundle:
        root = tmp_path / "student"
        shutil.copytree(tiny_sources, root)
        unet: Any = UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32)
        change(unet)
        unet.save_pretrained(root / "unet")
        manifest = Bundle.open(tiny_sources).manifest
        recipe = {"name": "tiny", "teacher": str(tiny_sources), "seed": 5, "adaptation": {"strength": 0.1}}
        return write_manifest(root, manifest.model_copy(update={"provenance": {"recipe": recipe}}))

    return make


@pytest.fixture
def low_rank_student(student_of: Callable[[Change], Bundle]) -> Bundle:
    return student_of(of_low_rank)


@pytest.fixture
def full_student(student_of: Callable[[Change], Bundle]) -> Bundle:
    return student_of(everywhere)
