"""Digits: the real scans, in range, with a split that never changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from distill.data.digits import NUM_CLASSES, TRAIN_COUNT, load_digits


def test_shapes_types_and_range() -> None:
    images, labels = load_digits("all")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(NUM_CLASSES))


def test_the_split_is_a_partition() -> None:
    (train, train_labels), (held, held_labels), (both, labels) = (load_digits(s) for s in ("train", "held_out", "all"))  # type: ignore[arg-type]
    assert len(train) == TRAIN_COUNT
    np.testing.assert_array_equal(np.concatenate([train, held]), both)
    np.testing.assert_array_equal(np.concatenate([train_labels, held_labels]), labels)


def test_every_class_is_in_both_parts_in_fair_share() -> None:
    for split, least in (("train", 100), ("held_out", 15)):
        assert np.bincount(load_digits(split)[1], minlength=NUM_CLASSES).min() >= least  # type: ignore[arg-type]


def test_the_split_never_changes() -> None:
    digest = hashlib.sha256(load_digits("held_out")[0].tobytes()).hexdigest()
    assert digest[:16] == "e60e320fc0a382ac"


def test_images_belong_to_their_labels() -> None:
    """The nearest class mean of the training scans names most held-out ones: labels were not shuffled apart."""
    images, labels = load_digits("train")
    means = np.stack([images[labels == k].mean(0).ravel() for k in range(NUM_CLASSES)])
    held, truth = load_digits("held_out")
    guesses = ((held.reshape(len(held), 1, -1) - means) ** 2).sum(-1).argmin(1)
    assert (guesses == truth).mean() > 0.85


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'; use 'train', 'held_out' or 'all'"):
        load_digits("test")  # type: ignore[arg-type]
