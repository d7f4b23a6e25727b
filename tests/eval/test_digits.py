"""The judge of digits: real training on real scans, and what it then says of true and of damaged pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.data.digits import load_digits
from eval.errors import EvalError
from eval.metrics import create, digits
from eval.metrics.base import Samples
from eval.prompts import Prompt, build_prompts, load_suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judges")
    command = [sys.executable, "-m", "eval.digits", "--out", str(root / "digits-cnn")]
    assert "held-out scans" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return root


def scans() -> tuple[np.ndarray, list[Prompt]]:
    pictures, labels = load_digits("held_out")
    prompts = [Prompt(f"d{i}", str(label), i, label=int(label)) for i, label in enumerate(labels)]
    return digits.as_pictures(pictures), prompts


def test_the_classifier_reads_held_out_scans(folder: Path) -> None:
    right, count = digits.held_out_accuracy(digits.load(folder / "digits-cnn"))
    assert count == 297 and right / count > 0.96


def test_training_is_reproducible() -> None:
    one, two = (digits.train(seed=3, epochs=1).state_dict() for _ in range(2))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_scores_are_right_for_true_pictures_and_fall_with_damage(folder: Path) -> None:
    images, prompts = scans()
    noise = np.random.default_rng(0).normal(0, 90, images.shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    found = {}
    for name, options in (("digit-accuracy", {}), ("fid", {"extractor": "digits-cnn", "reference_world": "digits"})):
        for kind, pictures in (("true", images), ("noisy", noisy)):
            metric = create(name, folder=folder, **options)
            metric.update(Samples(pictures, tuple(prompts)))
            found[name, kind] = metric.compute()
    accuracy = found["digit-accuracy", "true"]
    assert accuracy.value > 96 and accuracy.ci[0] < accuracy.value <= accuracy.ci[1]
    assert found["digit-accuracy", "noisy"].value < accuracy.value - 5
    assert found["fid", "noisy"].ci[0] > found["fid", "true"].ci[1]
    assert found["fid", "true"].protocol["reference"] == {"world": "digits", "count": 1797}


def test_digit_suites_ask_for_every_digit_equally_often() -> None:
    labels = [prompt.label for prompt in build_prompts(load_suite("digits"), 200)]
    assert np.bincount(np.array(labels)).tolist() == [20] * 10


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    metric = create("digit-accuracy", folder=folder)
    with pytest.raises(EvalError, match="prompts with labels"):
        metric.update(Samples(np.zeros((1, 3, 8, 8), np.uint8), (Prompt("p", "a cube", 0),)))
    with pytest.raises(EvalError, match="digits-cnn is missing"):
        create("digit-accuracy", folder=tmp_path)
    (tmp_path / "digits-cnn").mkdir()
    with pytest.raises(EvalError, match=r"config\.json is missing; make it with: python -m eval\.digits"):
        create("digit-accuracy", folder=tmp_path)
    wrong = create("fid", folder=folder, extractor="digits-cnn", reference_world="digits")
    prompts = tuple(Prompt(f"p{i}", "1", i, label=1) for i in (0, 1))
    for judge in (wrong, metric):
        with pytest.raises(EvalError, match="16×16 but digits are 8×8"):
            judge.update(Samples(np.zeros((2, 3, 16, 16), np.uint8), prompts))
