"""Small real parts: a CLIPModel of random weights, and prompts of scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eval.prompts import Prompt, build_prompts, load_suite


@pytest.fixture(scope="session")
def judges_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of judges with scenes-clip and scenes-reward: CLIPModels of two layers and seeded random weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from distill.data.tokenizer import build_tokenizer

    root = tmp_path_factory.mktemp("judges")
    build_tokenizer(root / "scenes-reward" / "tokenizer", max_tokens=16)
    tokenizer = CLIPTokenizer.from_pretrained(root / "scenes-reward" / "tokenizer")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **vision,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 64, "patch_size": 16}, projection_dim=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("scenes-clip", "scenes-reward"):
            CLIPModel(config).save_pretrained(root / name)
    return root


@pytest.fixture
def scene_prompts() -> Callable[[int], list[Prompt]]:
    return lambda count: build_prompts(load_suite("scenes-trained"), count)
