"""CLIP rewards: ours, and published ones against transformers' own processor and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from distill.config import ClipTower
from distill.data.tokenizer import build_tokenizer
from distill.rewards import ClipReward, clip_cosine, load_reward
from distill.rewards.weights import WeightsError
from distill.tasks.clip import tower
from distill.tasks.common import to_float

PROMPTS = ["a red cube", "a small green ball left of a large blue cylinder", "a gray metal sphere", "a red cube"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the recipes write it: a small CLIPModel in float16 beside its tokenizer."""
    folder = tmp_path_factory.mktemp("rewards") / "some-reward"
    build_tokenizer(folder / "tokenizer", 24)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    text = tower(ClipTower(width=32, layers=1, heads=2), tokenizer, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    clip.half().save_pretrained(folder)
    return folder


def pictures(n: int = 4, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


# --- CLIP ----------------------------------------------------------------------------------------------------------


def test_clip_reward_is_a_hundred_times_the_cosine(clip_folder: Path) -> None:
    reward = load_reward(clip_folder)
    assert isinstance(reward, ClipReward)
    assert (reward.name, reward.requires_grad, reward.range) == ("some-reward", True, (-100.0, 100.0))
    scores = reward.score(pictures(), PROMPTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32 and not scores.requires_grad

    reference = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        out = reference(input_ids=ids, pixel_values=pictures().float() / 127.5 - 1)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
    assert float(scores.std()) > 0.1


def test_clip_scores_are_per_row_and_bounded(clip_folder: Path) -> None:
    reward, images = load_reward(clip_folder), pictures()
    together = reward.score(images, PROMPTS)
    for i in range(4):
        torch.testing.assert_close(
            reward.score(images[i : i + 1], PROMPTS[i : i + 1])[0], together[i], atol=1e-3, rtol=0
        )
    assert float(together.abs().max()) <= 100


def test_clip_reward_is_frozen_and_its_cosine_is_differentiable(clip_folder: Path) -> None:
    reward = load_reward(clip_folder)
    assert not any(p.requires_grad for p in reward.clip.parameters()) and not reward.clip.training
    pixels = to_float(pictures()).requires_grad_()
    clip_cosine(reward.clip, reward.tokenizer, pixels, PROMPTS).sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.abs().sum((1, 2, 3)).gt(0).all())


def test_numbers_of_pictures_and_prompts_must_agree(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="4 pictures and 2 prompts; give one prompt per picture"):
        load_reward(clip_folder).score(pictures(), PROMPTS[:2])


# --- published -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(clip_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as CLIP and PickScore publish theirs: weights, tokenizer and processor in one folder."""
    root = tmp_path_factory.mktemp("published")
    tokenizer = CLIPTokenizer.from_pretrained(clip_tokenizer, pad_token="<|endoftext|>")
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14, "projection_dim": 16,
    }  # fmt: skip
    text = tower(ClipTower(width=32, layers=2, heads=2), tokenizer, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=3.0)
        )
        for parameter in clip.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.save_pretrained(root)
    tokenizer.save_pretrained(root)
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(root)
    return root


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_published_scores_are_those_of_the_processor_and_model(
    published: Path, name: str, gallery: dict[tuple[int, int], Image.Image]
) -> None:
    reward = load_reward(f"{name}:{published}")
    model = CLIPModel.from_pretrained(published).eval()
    factor = 100.0 if name == "clip" else float(model.logit_scale.detach().exp())
    assert reward.factor == pytest.approx(factor) and reward.range == (-reward.factor, reward.factor)
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(published), CLIPTokenizer.from_pretrained(published))
    for shape, picture in gallery.items():
        inputs = processor(text=PROMPTS, images=[picture], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        expected = factor * (out.image_embeds * out.text_embeds).sum(-1)
        images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].expand(4, -1, -1, -1)
        torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=0.003 * factor)
        assert float(expected.std()) > 0.01 * factor, shape


def test_pickscore_reads_with_the_tokenizer_of_its_base_model(published: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    with pytest.raises(
        WeightsError, match=r"^pickscore.*'laion/CLIP-ViT-H-14-laion2B-s32B-b79K' .*hf download laion/CLIP"
    ):
        load_reward(f"pickscore:{tmp_path}")


def test_processors_that_are_not_understood_are_refused(published: Path, tmp_path: Path) -> None:
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"resample": 3', '"resample": 2'))
    with pytest.raises(WeightsError, match="asks for another resampling than bicubic"):
        load_reward(f"clip:{tmp_path}")


def test_prompts_that_repeat_are_read_once(published: Path) -> None:
    reward, texts = load_reward(f"clip:{published}"), []
    reward.clip.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores = reward.score(pictures(4, 56)[:1].expand(4, -1, -1, -1), PROMPTS)
    assert texts == [3] and scores[0] == scores[3] and scores[0] != scores[1]
