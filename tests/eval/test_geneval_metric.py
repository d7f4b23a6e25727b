"""GenEval as a metric: over an eye that reads flat pictures exactly, and over tiny networks of published classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.errors import EvalError
from eval.geneval import Found
from eval.metrics import create
from eval.metrics import geneval as module
from eval.metrics.base import Samples
from eval.prompts import Prompt, load_suite

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


class Exact:
    """Finds the columns that are not black: one thing, called a patch."""

    def find(self, picture: np.ndarray) -> dict[str, list[Found]]:
        lit = np.flatnonzero(picture.any(axis=(0, 1)))
        return {"patch": [Found((float(lit[0]), 0.0, float(lit[-1] + 1), 8.0), 0.99)]} if len(lit) else {}

    def colours(self, picture: np.ndarray, things: Sequence[Found], name: str) -> list[str]:
        middle = [picture[:, 4, int(thing.box[0])] for thing in things]
        return [min(COLOURS, key=lambda c: np.abs(np.array(COLOURS[c]) - m).sum()) for m in middle]


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"a {c} patch", "tag": "colors", "include": [{"class": "patch", "count": 1, "color": c}]}
        for c in COLOURS
    ]
    path = tmp_path / "wanted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture(colour: str) -> np.ndarray:
    image = np.zeros((3, 8, 8), np.uint8)
    image[:, :, 2:5] = np.array(COLOURS[colour]).reshape(3, 1, 1)
    return image


def samples(*pairs: tuple[str, str]) -> Samples:
    images = np.stack([picture(shown) for _, shown in pairs])
    return Samples(images, tuple(Prompt(f"p{i}", f"a {asked} patch", i) for i, (asked, _) in enumerate(pairs)))


def test_right_and_wrong_pictures_are_told_apart_per_task(wanted: Path) -> None:
    metric = create("geneval", wanted=str(wanted), eye=Exact(), identity="0")
    metric.update(samples(("red", "red"), ("blue", "red")))
    metric.update(samples(("blue", "blue"), ("red", "red")))
    score = metric.compute()
    assert score.value == 75 and score.parts == {"colors": 0.75}
    np.testing.assert_array_equal(score.per_sample, [100, 0, 100, 100])


def test_prompts_that_are_not_geneval_s_are_refused(wanted: Path) -> None:
    metric = create("geneval", wanted=str(wanted), eye=Exact())
    with pytest.raises(EvalError, match="does not know what 'a green patch' asks for"):
        metric.update(Samples(picture("red")[None], (Prompt("p", "a green patch", 0),)))


def test_without_the_detector_it_is_not_run_and_its_source_is_named(wanted: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"geneval was not run: .* put facebook/mask2former-swin-small-coco-instance"):
        create("geneval", wanted=str(wanted), folder=tmp_path)
    assert load_suite("geneval").seeds_per_prompt == 4


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both networks of the published classes, tiny, with seeded random weights."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    from tests.conftest import tiny_tokenizer

    root = tmp_path_factory.mktemp("geneval")
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    sizes |= {"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=6, **sizes)
    config.id2label = {0: "cat", 1: "dog", 2: "kite"}
    tokenizer = tiny_tokenizer()
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(root / module.DETECTOR)
        clip = CLIPModel(CLIPConfig(text_config={**tower, **words}, vision_config=vision, projection_dim=8))
    clip.save_pretrained(root / module.NAMER)
    tokenizer.save_pretrained(root / module.NAMER)
    return root


def test_the_networks_give_boxes_of_their_masks_and_one_colour_each(
    networks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORT", 64)
    eye = module.Networks(networks)
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    found = eye.find(image)
    assert set(found) <= {"cat", "dog", "kite"} and found
    for name, things in found.items():
        for thing in things:
            assert thing.mask is not None and thing.mask.shape == (40, 60) and 0 < thing.score < 1
            rows, columns = np.nonzero(thing.mask)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert set(eye.colours(image, things, name)) <= set(module.COLOURS)
    again = eye.find(image)
    assert {n: [t.box for t in ts] for n, ts in again.items()} == {n: [t.box for t in ts] for n, ts in found.items()}
