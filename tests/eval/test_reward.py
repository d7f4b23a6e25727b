"""The reward as a metric: direction, batch size, marks, and refusal of scores that are no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data.world import COLOURS
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt
from eval.run import _was_trained_on
from eval.sources import FolderSource


class RedOnRequest:
    """100 × the share of red in a picture whose caption says red, else minus that: a reward that reads both."""

    name = "red-on-request"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        share = images[:, 0].float().mean(dim=(1, 2)) / 255
        sign = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts])
        return 100 * share * sign


class Broken(RedOnRequest):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts)[:-1]


def samples(count: int, red: int, colour: str = "red", size: int = 64) -> Samples:
    assert colour in COLOURS
    images = np.random.default_rng(0).integers(0, 40, (count, 3, size, size)).astype(np.uint8)
    images[:, 0] += red
    return Samples(images, tuple(Prompt(f"p{i}", f"a {colour} cube", i) for i in range(count)))


def score(made: Samples, batch: int, **options: Any) -> Any:
    metric = create("reward", scorer=RedOnRequest(), identity="0", **options)
    for start in range(0, len(made.prompts), batch):
        metric.update(Samples(made.images[start : start + batch], made.prompts[start : start + batch]))
    return metric.compute()


def test_reward_is_the_mean_and_follows_picture_and_prompt() -> None:
    made = samples(40, 100)
    found = score(made, 40)
    assert found.value == pytest.approx(100 * made.images[:, 0].mean() / 255, rel=1e-6)
    assert found.ci[0] < found.value < found.ci[1] and found.n == 40
    assert score(samples(40, 150), 40).value > found.value > score(samples(40, 100, "blue"), 40).value
    assert found.protocol == {"reward": "red-on-request", "weights": "0"}


def test_reward_does_not_depend_on_the_batch_size() -> None:
    one, all_at_once = score(samples(30, 90), 1), score(samples(30, 90), 30)
    np.testing.assert_allclose(one.per_sample, all_at_once.per_sample, rtol=1e-6)
    assert one.interval.value == pytest.approx(all_at_once.interval.value)


def test_training_on_the_reward_is_marked(tmp_path: Path) -> None:
    source = FolderSource(tmp_path)
    source.about = {"provenance": {"recipe": {"advantage": {"reward": "models/scenes-reward"}}}}
    assert _was_trained_on(source, "scenes-reward")
    assert not _was_trained_on(source, "other-reward")
    source.about = {"provenance": {"recipe": {"advantage": None}}}
    assert not _was_trained_on(source, "scenes-reward")
    assert score(samples(3, 1), 3, trained_on=True).trained_on


def test_the_embedded_reward_is_one_hundred_cosines(judges_folder: Path) -> None:
    """Through the real reward and a real CLIPModel folder, against transformers' own features."""
    from transformers import CLIPModel, CLIPTokenizer

    made = samples(4, 60)
    metric = create("reward", folder=judges_folder)
    metric.update(made)
    path = judges_folder / "scenes-reward"
    clip, tokenizer = CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path / "tokenizer")
    tokens = tokenizer([p.text for p in made.prompts], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = torch.from_numpy(made.images).float() / 127.5 - 1
        out = clip(input_ids=tokens.input_ids, pixel_values=pixels)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(dim=1)
    np.testing.assert_allclose(metric.compute().per_sample, expected.numpy(), atol=1e-3)


def test_a_folder_without_a_reward_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenes-reward").mkdir()
    with pytest.raises(EvalError, match="does not load as a reward"):
        create("reward", folder=tmp_path)


def test_missing_scores_are_refused() -> None:
    metric = create("reward", scorer=Broken(), identity="0")
    with pytest.raises(EvalError, match="gave 2 values for 3 samples"):
        metric.update(samples(3, 10))
    with pytest.raises(EvalError, match="saw 0 samples"):
        metric.compute()


class Brightening(RedOnRequest):
    """A reward of clips: how much brighter the last frame is than the first."""

    name, video = "brightening", True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert images.shape[1:] == (3, 5, 8, 8), "channels come before frames"
        return (images[:, :, -1].float() - images[:, :, 0].float()).mean(dim=(1, 2, 3))


def test_a_reward_of_videos_judges_clips_and_no_pictures() -> None:
    levels = np.broadcast_to(np.arange(0, 50, 10, dtype=np.uint8)[None, :, None, None, None], (3, 5, 3, 8, 8)).copy()
    prompts = tuple(Prompt(f"p{i}", "a cube", i) for i in range(3))
    metric = create("reward", scorer=Brightening(), identity="0")
    metric.update(Samples(levels, prompts))
    assert metric.compute().value == 40
    with pytest.raises(EvalError, match="brightening judges clips"):
        metric.update(samples(2, 10))
    with pytest.raises(EvalError, match="red-on-request judges pictures"):
        create("reward", scorer=RedOnRequest(), identity="0").update(Samples(levels, prompts))
