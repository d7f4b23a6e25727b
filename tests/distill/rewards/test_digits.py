"""The digit classifier: log-probability of the label, and a folder that gives back what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.bundle import sha256
from distill.data.digits import load_digits
from distill.rewards import DigitClassifier, load_reward
from distill.tasks.common import to_uint8


def pictures(n: int = 4, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_digit_reward_is_the_log_probability_of_the_label() -> None:
    classifier = DigitClassifier(8).eval()
    images = pictures(3)
    scores = classifier.score(images, [3, 0, 9])
    logits = classifier(images).detach().double().numpy()
    expected = [logits[i, k] - np.log(np.exp(logits[i]).sum()) for i, k in enumerate((3, 0, 9))]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad and bool((scores <= 0).all())


def test_digit_classifier_reads_gray_and_coloured_pictures_alike() -> None:
    classifier = DigitClassifier(8).eval()
    gray = pictures(3)[:, :1]
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
    assert again.digest == sha256(tmp_path / "judge/model.safetensors")
    assert torch.equal(again.score(pictures(), [1, 2, 3, 4]), classifier.score(pictures(), [1, 2, 3, 4]))
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


def test_numbers_of_pictures_and_labels_must_agree() -> None:
    with pytest.raises(ValueError, match="4 pictures and 2 labels; give one label per picture"):
        DigitClassifier(8).score(pictures(), [1, 2])
