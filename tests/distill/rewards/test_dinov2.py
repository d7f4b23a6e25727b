"""DINOv2's class log-probability equals transformers' own classifier behind its own processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

from distill.rewards import load_reward
from distill.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD
from distill.rewards.weights import WeightsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of 7 classes with the processor that DINOv2's repositories hold, at a quarter of its size."""
    root = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, num_labels=7
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2ForImageClassification(config)
        torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(root)
    BitImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 56, "width": 56},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(root)
    return root


def test_scores_are_log_probabilities_of_the_label(
    folder: Path, gallery: dict[tuple[int, int], Image.Image], batches: dict[tuple[int, int], Tensor]
) -> None:
    reward = load_reward(f"dinov2:{folder}")
    model = Dinov2ForImageClassification.from_pretrained(folder).eval()
    processor = BitImageProcessor.from_pretrained(folder)
    for shape, picture in gallery.items():
        with torch.no_grad():
            logits = model(**processor(picture, return_tensors="pt")).logits[0]
        scores = reward.score(batches[shape].expand(7, -1, -1, -1), list(range(7)))
        torch.testing.assert_close(scores, logits.log_softmax(0), rtol=0, atol=0.02)
        torch.testing.assert_close(scores.exp().sum(), torch.tensor(1.0))
        assert float(scores.std()) > 0.2, shape


def test_gradient_raises_the_probability(folder: Path, batches: dict[tuple[int, int], Tensor]) -> None:
    reward = load_reward(f"dinov2:{folder}")
    pixels = (0.9 * (batches[64, 64].float() / 127.5 - 1)).requires_grad_()
    before = reward.score_pixels(pixels, [3])
    gradient = torch.autograd.grad(before.sum(), pixels)[0]
    after = reward.score_pixels(pixels.detach() + gradient / gradient.norm(), [3])
    assert bool((after > before).all())


def test_unknown_labels_and_folders_are_refused(
    folder: Path, batches: dict[tuple[int, int], Tensor], tmp_path: Path
) -> None:
    reward = load_reward(f"dinov2:{folder}")
    with pytest.raises(ValueError, match="labels run from 7 to 7; use 0 to 6"):
        reward.score(batches[64, 64], [7])
    with pytest.raises(ValueError, match="1 pictures and 2 labels; give one label per picture"):
        reward.score(batches[64, 64], [1, 2])
    with pytest.raises(WeightsError, match="dinov2: there is no folder '/nowhere'; give one, or a hub id"):
        load_reward("dinov2:/nowhere")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match="does not load as a classifier"):
        load_reward(f"dinov2:{tmp_path}")
