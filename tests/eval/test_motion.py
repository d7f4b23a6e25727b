"""Motion accuracy: the rule, the interval, direction, independence of batch size, and a real labeller in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.captions import describe
from distill.data.world import MOTIONS, sample_scene
from distill.motion import MotionLabeller, Movement
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.metrics.motion import stated
from eval.prompts import Prompt, build_prompts, load_suite
from eval.statistics import wilson


def numbered(count: int) -> Samples:
    """Clips of the suite's prompts that carry their number in two pixels."""
    prompts = build_prompts(load_suite("scenes-wan-trained"), count)
    clips = np.zeros((count, 5, 3, 8, 8), np.uint8)
    for i in range(count):
        clips[i, :, 0, 0, :2] = divmod(i, 256)
    return Samples(clips, tuple(prompts))


class Oracle:
    """Sees what the scene of a numbered clip does; of every ``wrong``-th it says another motion."""

    def __init__(self, samples: Samples, wrong: int = 0, blind: int = 0) -> None:
        self.prompts, self.wrong, self.blind = samples.prompts, wrong, blind

    def watch(self, clips: Any) -> Sequence[Movement]:
        assert clips.shape[1:] == (3, 5, 8, 8) and clips.dtype == torch.uint8
        found = []
        for clip in clips:
            number = int(clip[0, 0, 0, 0]) * 256 + int(clip[0, 0, 0, 1])
            scene = self.prompts[number].scene
            assert scene is not None
            truth = Movement.of(scene)
            if self.wrong and number % self.wrong == 0:
                truth = Movement(MOTIONS[(MOTIONS.index(truth.motion) + 1) % 7] if truth.shape else "still")
            if self.blind and number % self.blind == 0:
                truth = Movement(truth.motion, "cube", "no colour") if truth.shape else truth
            found.append(truth)
        return found


def score(samples: Samples, oracle: Oracle, batch: int = 64) -> Score:
    metric = create("motion-accuracy", labeller=oracle, identity="oracle")
    for start in range(0, len(samples.prompts), batch):
        metric.update(Samples(samples.images[start : start + batch], samples.prompts[start : start + batch]))
    return metric.compute()


def test_true_clips_are_right_and_each_wrong_one_counts_once() -> None:
    made = numbered(200)
    perfect, half = score(made, Oracle(made)), score(made, Oracle(made, wrong=2))
    assert perfect.value == 100 and perfect.parts["of the right thing"] == 1 and perfect.parts["seen as still"] == 0
    expected = wilson(100, 200)
    assert half.value == 50 and half.ci == pytest.approx((100 * expected.low, 100 * expected.high))
    assert half.per_sample[::2].sum() == 0 and half.per_sample[1::2].min() == 100


def test_it_falls_with_the_damage_and_tells_motion_from_the_moving_thing() -> None:
    made = numbered(60)
    values = [score(made, Oracle(made, wrong=wrong)).value for wrong in (0, 10, 3, 1)]
    assert values == sorted(values, reverse=True) and values[-1] == 0
    confused = score(made, Oracle(made, blind=1))
    assert confused.value == 100 and confused.parts["of the right thing"] < 0.5


def test_it_does_not_depend_on_the_batch_size() -> None:
    made = numbered(30)
    one, whole = score(made, Oracle(made, wrong=4), 1), score(made, Oracle(made, wrong=4), 30)
    np.testing.assert_array_equal(one.per_sample, whole.per_sample)
    assert one.parts == whole.parts and one.interval == whole.interval


@pytest.mark.parametrize("index", range(40))
def test_what_a_caption_states_is_what_the_scene_does(index: int) -> None:
    scene = sample_scene(7_150_000, index, moving=True)
    truth = Movement.of(scene)
    assert stated(describe(scene, np.random.default_rng(index))) == (truth.motion, truth.shape, truth.colour)


def test_the_labeller_of_a_folder_gives_the_answers_that_it_gives_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labeller = MotionLabeller(8).eval().requires_grad_(False)
    labeller.save(tmp_path / "scenes-motion", {})
    made = numbered(6)
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3, 16, 16), dtype=np.uint8)
    metric = create("motion-accuracy", folder=tmp_path)
    metric.update(Samples(noise, made.prompts))
    answers = MotionLabeller.load(tmp_path / "scenes-motion").watch(torch.from_numpy(noise).transpose(1, 2))
    truths = [Movement.of(prompt.scene).motion for prompt in made.prompts if prompt.scene]
    assert metric.compute().per_sample.tolist() == [
        100.0 * (a.motion == t) for a, t in zip(answers, truths, strict=True)
    ]
    assert len(metric.compute().protocol["labeller"]) == 64


def test_prompts_without_motion_are_refused(tmp_path: Path) -> None:
    made = numbered(1)
    still = Samples(made.images, (Prompt("p", "a red cube", 0),))
    with pytest.raises(EvalError, match="says nothing of motion"):
        score(still, Oracle(made))
    with pytest.raises(EvalError, match="scenes-motion is missing"):
        create("motion-accuracy", folder=tmp_path)
