"""The video reward: a folder round trip, batches, gradients, and captions that come twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from distill.data.tokenizer import build_t5_tokenizer
from distill.motion import ClipTrunk
from distill.rewards import load_reward
from distill.rewards.video import VideoReward, VideoTower
from distill.tasks.common import save_half

CAPTIONS = ["a red cube sliding left", "a small blue sphere bouncing", "a red cube sliding left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("video-reward")
    torch.manual_seed(0)
    build_t5_tokenizer(root / "text_encoder" / "tokenizer", 32)
    tokenizer = AutoTokenizer.from_pretrained(root / "text_encoder" / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config)
    save_half(encoder, root / "text_encoder")
    tower = VideoTower(8, 1, 16, 12, ClipTrunk.grid(9, 32))
    VideoReward(tower, encoder, tokenizer, root.name).save(root, {})
    return root


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 9, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_folder_is_a_reward_by_its_name(folder: Path) -> None:
    reward = load_reward(folder)
    assert isinstance(reward, VideoReward) and reward.video and reward.name == folder.name and len(reward.digest) == 64
    scores = reward.score(clips(), CAPTIONS)
    assert scores.shape == (3,) and bool((scores.abs() <= 100).all())
    one_by_one = torch.cat([reward.score(clips()[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-4, atol=1e-3)
    assert torch.equal(scores, load_reward(folder).score(clips(), CAPTIONS))


def test_its_gradient_reaches_the_pixels_of_every_frame(folder: Path) -> None:
    pixels = (clips().float() / 127.5 - 1).requires_grad_()
    load_reward(folder).score_pixels(pixels, CAPTIONS).sum().backward()
    assert pixels.grad is not None
    assert bool((pixels.grad.abs().amax((1, 3, 4)) > 0).all())


def test_counts_must_agree(folder: Path) -> None:
    with pytest.raises(ValueError, match="3 pictures and 2 prompts"):
        load_reward(folder).score(clips(), CAPTIONS[:2])
