"""Accuracy of frames: shares of frames by hand, the judge of stills frame by frame, direction, batches, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.composition import compare
from eval.metrics.frame_composition import spread
from eval.prompts import Prompt, build_prompts, load_suite
from tests.eval.test_composition import Seen

FRAMES = 9


def numbered(count: int) -> Samples:
    """Clips of the suite's prompts; a frame carries the clip's number and its own."""
    prompts = build_prompts(load_suite("scenes-wan-trained"), count)
    clips = np.zeros((count, FRAMES, 3, 4, 4), np.uint8)
    for i in range(count):
        clips[i, :, 0, 0, 0], clips[i, :, 0, 0, 1] = i, np.arange(FRAMES)
    return Samples(clips, tuple(prompts))


class Oracle:
    """Sees the scene of a numbered frame, from frame ``lost`` on without its first thing."""

    def __init__(self, samples: Samples, lost: int = FRAMES) -> None:
        self.prompts, self.lost, self.asked = samples.prompts, lost, []  # type: ignore[var-annotated]

    def detect(self, images: Any) -> Sequence[Sequence[Seen]]:
        found = []
        for picture in images:
            number, frame = int(picture[0, 0, 0]), int(picture[0, 0, 1])
            self.asked.append((number, frame))
            scene = self.prompts[number].scene
            assert scene is not None
            things = scene.at(frame / 8).things[int(frame >= self.lost) :]
            found.append([Seen(t.shape, t.colour, t.size, t.material, t.x, t.z) for t in things])
        return found


def score(samples: Samples, oracle: Oracle, frames: int = 5, batch: int = 64) -> Score:
    metric = create("frame-composition", labeller=oracle, identity="oracle", frames=frames)
    for start in range(0, len(samples.prompts), batch):
        metric.update(Samples(samples.images[start : start + batch], samples.prompts[start : start + batch]))
    return metric.compute()


def test_a_clip_is_as_right_as_its_frames() -> None:
    made = numbered(40)
    perfect, lost = score(made, Oracle(made)), score(made, Oracle(made, lost=6))
    assert perfect.value == 100 and set(perfect.parts.values()) == {1.0}
    assert lost.value == 60 and lost.parts["first"] == 1 and lost.parts["last"] == lost.parts["every frame"] == 0
    assert lost.parts["count"] == pytest.approx(0.6) and lost.protocol["frames"] == 5


def test_frames_are_those_that_the_judge_of_stills_finds_right() -> None:
    """Against ``compare`` on every chosen frame, one by one."""
    made, share = numbered(25), []
    oracle = Oracle(made, lost=3)
    for i, prompt in enumerate(made.prompts):
        assert prompt.caption is not None
        right = [compare(oracle.detect(made.images[i, [f]])[0], prompt.caption) for f in (0, 2, 4, 6, 8)]
        share.append(100 * np.mean(right))
    assert score(made, Oracle(made, lost=3)).per_sample.tolist() == share


def test_only_the_chosen_frames_are_looked_at() -> None:
    made = numbered(1)
    oracle = Oracle(made)
    score(made, oracle, frames=3)
    assert oracle.asked == [(0, 0), (0, 4), (0, 8)]
    assert spread(17, 5) == [0, 4, 8, 12, 16] and spread(5, 5) == [0, 1, 2, 3, 4]


def test_it_falls_with_the_damage_and_not_with_the_batch_size() -> None:
    made = numbered(20)
    values = [score(made, Oracle(made, lost=lost)).value for lost in (9, 7, 3, 0)]
    assert values == sorted(values, reverse=True) and values[-1] == 0
    one, whole = score(made, Oracle(made, lost=5), batch=1), score(made, Oracle(made, lost=5), batch=20)
    np.testing.assert_array_equal(one.per_sample, whole.per_sample)


def test_short_clips_and_prompts_without_facts_are_refused() -> None:
    made = numbered(2)
    with pytest.raises(EvalError, match="frames is 10 of clips of 9; use 2 to 9"):
        score(made, Oracle(made), frames=10)
    with pytest.raises(EvalError, match="no facts"):
        score(Samples(made.images[:1], (Prompt("p", "a cat", 0),)), Oracle(made))
