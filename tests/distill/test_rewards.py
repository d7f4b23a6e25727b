"""Rewards: the contract that distillation and evaluation rely on, and folders that give back what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.config import ClipTower
from distill.data.captions import true_of
from distill.data.digits import load_digits
from distill.data.tokenizer import build_tokenizer
from distill.data.world import sample_scene
from distill.rewards import ClipReward, DigitClassifier, clip_cosine, load_reward
from distill.tasks.clip import tower, wrong_caption
from distill.tasks.common import to_float, to_uint8
from distill.tasks.reward import degrade

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


# --- digits --------------------------------------------------------------------------------------------------------


def test_digit_reward_is_the_log_probability_of_the_label() -> None:
    classifier = DigitClassifier(8).eval()
    images = pictures(3, 8)
    scores = classifier.score(images, [3, 0, 9])
    logits = classifier(images).detach().double().numpy()
    expected = [logits[i, k] - np.log(np.exp(logits[i]).sum()) for i, k in enumerate((3, 0, 9))]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad and bool((scores <= 0).all())


def test_digit_classifier_reads_gray_and_coloured_pictures_alike() -> None:
    classifier = DigitClassifier(8).eval()
    gray = pictures(3, 8)[:, :1]
    assert torch.equal(classifier(gray), classifier(gray.expand(-1, 3, -1, -1)))
    assert classifier.features(gray).shape == (3, 64)


def test_saved_classifier_gives_the_same_scores(tmp_path: Path) -> None:
    classifier = DigitClassifier(8).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(parameter.half().float())
    classifier.save(tmp_path / "judge", 0.987)
    again = load_reward(tmp_path / "judge")
    assert isinstance(again, DigitClassifier) and again.name == "judge" and not again.training
    assert torch.equal(again.score(pictures(4, 8), [1, 2, 3, 4]), classifier.score(pictures(4, 8), [1, 2, 3, 4]))
    config = json.loads((tmp_path / "judge/config.json").read_text())
    assert config == {"kind": "digit-classifier", "width": 8, "accuracy": 0.987}


def test_a_trained_classifier_prefers_the_right_label() -> None:
    """A short training on the real digits: the contract's direction, larger is better."""
    images, labels = load_digits("train")
    pixels, answers = to_uint8(torch.from_numpy(images)), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = DigitClassifier(8)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for i in range(40):
        rows = torch.arange(i * 64, i * 64 + 64) % len(pixels)
        loss = torch.nn.functional.cross_entropy(classifier(pixels[rows]), answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out, truth = load_digits("held_out")
    judged = to_uint8(torch.from_numpy(held_out))
    right = classifier.score(judged, truth.tolist())
    wrong = classifier.score(judged, ((truth + 3) % 10).tolist())
    assert float((right > wrong).float().mean()) > 0.9


# --- the contract --------------------------------------------------------------------------------------------------


def test_numbers_of_pictures_and_conditions_must_agree(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="4 pictures and 2 prompts; give one prompt per picture"):
        load_reward(clip_folder).score(pictures(), PROMPTS[:2])
    with pytest.raises(ValueError, match="4 pictures and 2 labels; give one label per picture"):
        DigitClassifier(8).score(pictures(4, 8), [1, 2])


@pytest.mark.parametrize("config", [None, {}, {"model_type": "bert"}])
def test_folders_without_a_reward_are_refused(tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no reward; give a folder with a CLIPModel or a digit classifier"):
        load_reward(tmp_path)


# --- what rewards learn from ---------------------------------------------------------------------------------------


def test_every_picture_is_damaged_and_stays_in_range() -> None:
    clean = to_float(pictures(48))
    damaged = degrade(clean, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert damaged.shape == clean.shape and float(damaged.abs().max()) <= 1
    assert float((damaged - clean).abs().flatten(1).mean(1).min()) > 0.01
    again = degrade(clean, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert torch.equal(damaged, again)


def test_a_wrong_caption_is_false_but_nearly_right() -> None:
    rng, kinds = np.random.default_rng(0), set()
    for index in range(300):
        scene = sample_scene(11, index)
        caption = wrong_caption(scene, rng)
        assert not true_of(caption, scene)
        kinds_stated = sorted(tuple(value for _, value in d.stated) for d in caption.things)
        kinds_shown = sorted((t.shape, t.colour, t.size, t.material) for t in scene.things)
        missing = [kind for kind in kinds_shown if kind not in kinds_stated]
        kinds.add("attribute" if missing else "places")
        assert len(missing) <= 1
    assert kinds == {"attribute", "places"}


def test_uint8_and_float_pictures_convert_without_loss() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0, 0.0])).tolist() == [0, 255, 128]
