"""Small real parts: a CLIPModel of random weights, and prompts of scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eval.prompts import Prompt, build_prompts, load_suite


@pytest.fixture(scope="session")
def judges_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of judges with scenes-clip: a CLIPModel of two layers and seeded random weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    root = tmp_path_factory.mktemp("judges")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 64, "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 64, "patch_size": 16}, projection_dim=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(root / "scenes-clip")
    return root


@pytest.fixture
def scene_prompts() -> Callable[[int], list[Prompt]]:
    return lambda count: build_prompts(load_suite("scenes-trained"), count)
