"""Pictures and tokenizers that the tests of published rewards share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.data.tokenizer import build_tokenizer

PROMPTS = ("a red cube", "a small green ball left of a large blue cylinder", "a gray metal sphere!", "a red cube")


@pytest.fixture
def prompts() -> list[str]:
    return list(PROMPTS)


@pytest.fixture(scope="session")
def gallery() -> dict[tuple[int, int], Image.Image]:
    """Smooth random pictures by (height, width), square and not, larger and smaller than a network's input."""
    rng = np.random.default_rng(0)
    shapes = ((56, 56), (64, 64), (128, 128), (200, 121), (97, 301), (40, 28))
    drawn = {}
    for height, width in shapes:
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3)).astype(np.uint8)
        drawn[height, width] = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return drawn


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer of 77 tokens that pads with "!", as some published ones do."""
    folder = tmp_path_factory.mktemp("tokenizers") / "clip"
    build_tokenizer(folder, 77)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "!"}))
    return folder


def tensor_of(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


@pytest.fixture
def batches(gallery: dict[tuple[int, int], Image.Image]) -> dict[tuple[int, int], Tensor]:
    """The pictures as tensors (1, 3, H, W) uint8."""
    return {shape: tensor_of(picture) for shape, picture in gallery.items()}
