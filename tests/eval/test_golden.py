"""Golden values: the same pictures everywhere, agreement, difference, and what is known of weights beside a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.errors import EvalError
from eval.golden import (
    GOLDEN,
    METRICS,
    Expected,
    clips,
    fill,
    measure,
    note,
    pictures,
    read_golden,
    record_of,
    unverified,
    verify,
)
from eval.metrics.preference import KINDS

VALUES = np.array([1.0, -2.0, 300.0])
KNOWN = {"hpsv2.1": [Expected(weights="abc", values=(1.0, -2.0, 300.0), tolerance=1e-3, source="the package")]}


def test_every_machine_makes_the_same_pictures() -> None:
    images, prompts = pictures()
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    assert digest[:16] == "7ed2e28929ef0e39" and len(prompts) == len(images) == 8
    assert images.std(axis=(1, 2, 3)).min() > 20


def test_every_machine_makes_the_same_clips_and_they_move() -> None:
    images, prompts = clips()
    assert images.shape == (8, 17, 3, 256, 256) and images.dtype == np.uint8 and len(prompts) == 8
    np.testing.assert_array_equal(images[:, 0], pictures()[0])
    np.testing.assert_array_equal(images[:, 5, ..., 20:], images[:, 0, ..., :-20])


class Shapes:
    """A scorer that notes what it is shown."""

    name, digest = "shapes", "abc"

    def __init__(self, video: bool) -> None:
        self.video, self.seen = video, list[tuple[int, ...]]()

    def score(self, images: torch.Tensor, conditions: Sequence[str]) -> torch.Tensor:
        self.seen.append(tuple(images.shape[1:]))
        return torch.arange(len(images), dtype=torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_scorers_of_motion_are_shown_clips_and_all_others_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Shapes(video=name == "videoalign")
    monkeypatch.setattr("eval.metrics.preference.load_published", lambda kind, source="": scorer)
    values, weights = measure(name, None)
    assert list(values) == list(range(8)) and weights == "abc"
    assert set(scorer.seen) == {(3, 17, 256, 256) if scorer.video else (3, 256, 256)}


def test_values_within_the_tolerance_are_verified_and_others_named() -> None:
    assert verify("hpsv2.1", KNOWN, lambda name: (VALUES * 1.0009, "abc")).status == "verified"
    found = verify("hpsv2.1", KNOWN, lambda name: (VALUES * [1, 1.01, 1], "abc"))
    assert found.status == "differs" and found.text == "value 1 is -2.02, expected -2 ± 0.1 % (the package)"
    assert verify("hpsv2.1", KNOWN, lambda name: (VALUES * [1, np.nan, 1], "abc")).status == "differs"
    assert verify("hpsv2.1", KNOWN, lambda name: (VALUES[:2], "abc")).status == "differs"


def test_other_weights_are_unknown_and_missing_ones_not_run() -> None:
    found = verify("hpsv2.1", KNOWN, lambda name: (VALUES, "def"))
    assert found.status == "unknown weights" and "known: abc" in found.text

    def missing(name: str) -> tuple[np.ndarray, str]:
        raise EvalError("hpsv2.1 was not run: put them there")

    assert verify("hpsv2.1", KNOWN, missing).text == "hpsv2.1 was not run: put them there"


def test_what_a_trusted_machine_fills_in_is_read_again_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "golden.yaml"
    path.write_text(GOLDEN.read_text())
    fill(path, "pickscore", VALUES / 3, "abc", "by hand")
    fill(path, "pickscore", VALUES, "def", "by hand")
    assert path.read_text().startswith("# What published scorers give")
    assert verify("pickscore", read_golden(path), lambda name: (VALUES / 3, "abc")).status == "verified"
    with pytest.raises(EvalError, match="already holds values of pickscore under abc"):
        fill(path, "pickscore", VALUES, "abc", "again")
    path.write_text("hpsv2.1: [{weights: a, value: [1]}]")
    with pytest.raises(EvalError, match=r"golden.yaml: values"):
        read_golden(path)


def test_scores_are_unverified_until_their_weights_agreed_and_again_when_they_differ(tmp_path: Path) -> None:
    store = tmp_path / "scores.sqlite"
    protocol = {"reward": "hpsv2.1", "weights": "abc"}
    assert unverified("hpsv2.1", protocol, store)
    note(record_of(store), verify("hpsv2.1", KNOWN, lambda name: (VALUES, "abc")), {})
    assert not unverified("hpsv2.1", protocol, store)
    assert unverified("hpsv2.1", protocol | {"weights": "def"}, store)
    note(record_of(store), verify("hpsv2.1", KNOWN, lambda name: (VALUES * 2, "abc")), {})
    assert unverified("hpsv2.1", protocol, store)


def test_our_own_judges_need_no_verification(tmp_path: Path) -> None:
    store = tmp_path / "scores.sqlite"
    assert not unverified("fid", {"extractor": "scenes-clip", "weights": "abc"}, store)
    assert not unverified("composition", {"labeller": "abc"}, store)
    assert unverified("fid", {"extractor": "inception-v3", "weights": "abc"}, store)


def test_the_shipped_file_is_sound() -> None:
    assert set(read_golden()) <= set(METRICS)
